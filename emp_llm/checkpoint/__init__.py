"""What a local checkpoint's files hold and how their bytes are read; none of its code is run.

regular_file        regular files only: no pipe, no device
small_files         files beside the weights, and links that are refused
json_files          JSON from strangers, read in bounded memory
dtypes              the dtypes of tensors by name
header              what a file of weights says it holds
source_file         a file of weights: any of its bytes, into a buffer
extents             where the bytes of tensors lie
assembled_file      a file of weights assembled while it is read
safetensors_header  the header of a safetensors file
torch_save/         files that torch.save wrote
shard               one file of weights: its tensors
open_files          files opened once and closed together
meta_llama/         Llamas in Meta's original format
weight_files        which files hold the weights
checkpoint          a folder: which files make up the checkpoint
"""
