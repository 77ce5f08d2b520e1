"""emp-llm inside transformers: pruning while loading, packed checkpoints, and fine-tuning.

configs         `EmpConfig`, and what a packed checkpoint's config.json says
tensor_readers  whole tensors read from the files: pruned, or unpacked, on the CPU or on a GPU
read_ahead      several of them read at once, on all cores
weight_feed     transformers' weight conversions, which get those tensors
packing         a tensor in memory, packed
saving          transformers' weight conversions, which pack what they give; `densify`
zero_mask       masks of zeros, one bit a weight
zeros           the pruned parameters of a model: found, their zeros kept and put back
training        `KeepSparsity` and `SparsityHold`, which keep the zeros while a model is trained
adapters        `merge_adapter`, which keeps them while adapters are merged
quantizers      what happens before, while and after weights are loaded
registration    makes `configs` and `quantizers` known to transformers

transformers calls every ``quantization_config`` a quantization; nothing here quantizes. The model
that comes out is an ordinary one: dense weights with zeros, no hooks, no modules of ours.
"""
