"""Packed checkpoints in servers of models.

options          the options of packed checkpoints in a server's own configuration
stored_weights   the weights of a packed checkpoint, one after the other
gathered_weight  a weight that loaders fill part by part, and that stays packed
vllm_layers      layers of vLLM whose weights stay packed; needs vLLM
vllm_config      what vLLM makes of a packed checkpoint's quantization_config; needs vLLM
vllm_plugin      makes that known to vLLM, which calls it

vLLM asks a quantization method for parameters, and each model's own code fills them from tensors
that it knows by name: it merges, splits and stacks these, for each architecture in its own way. So
packed tensors are unpacked where vLLM reads them from the files, before any model sees them, one at
a time: every architecture gets the dense tensors that it expects. Parameters that hold planes would
need each of these ways once more, and its own for experts. With ``keep_packed`` models get
`PackedWeight` instead, which is a dense tensor to look at, and `GatheredWeight` keeps its rows.
"""
