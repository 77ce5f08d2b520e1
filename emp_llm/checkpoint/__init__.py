"""What the files of a local checkpoint hold, and how their bytes are read. None of its code is run.

regular_file        opens regular files only: no pipe, no device
links               links out of a checkpoint are refused
left_behind         which files travel with the weights, and why others stay behind
folder_files        the files of a folder, and which of them travel
json_files          untrusted JSON, parsed in bounded memory
dtypes              the dtypes of tensors by name
header              the tensors that a file of weights holds, by its header
source_file         a file of weights, open for reading
extents             where the bytes of a tensor lie in files
assembled_file      a file of weights that is assembled from others
safetensors_header  the header of a safetensors file
torch_save/         files that torch.save wrote
shard               one file of weights, and what it holds
open_files          files of shards, opened once and closed together
meta_llama/         Llamas in Meta's original format
other_formats       formats of weights that are not read, and what helps
weight_files        which files hold the weights
checkpoint          a folder as a checkpoint
"""
