"""Where checkpoints come from, and what their files hold.

hub, repository, arrivals     a model by name, and its shards as they arrive
checkpoint, small_files       which files make up a checkpoint
safetensors_header            what a file of safetensors says of itself
torch_*                       the same of a file of torch.save, whose pickle is not run
original_*                    the same of a Llama in Meta's own format
shard, source_file, assembly  bytes of tensors, wherever they lie
"""
