"""Packed checkpoints in servers of models.

stored_weights  the weights of a packed checkpoint, one after the other
vllm_config     what vLLM makes of a packed checkpoint's quantization_config; needs vLLM
vllm_plugin     makes that known to vLLM, which calls it

vLLM asks a quantization method for parameters, and each model's own code fills them from tensors
that it knows by name: it merges, splits and stacks these, for each architecture in its own way. So
packed tensors are unpacked where vLLM reads them from the files, before any model sees them, one at
a time: every architecture gets the dense tensors that it expects. Parameters that hold planes would
need each of these ways once more, and its own for experts.
"""
