"""emp-llm inside transformers: pruning while loading, packed checkpoints, and fine-tuning.

    registration   tells transformers of what follows, once it is imported
    configs        EmpConfig, and what a packed checkpoint's config.json says
    quantizers     what happens before, while and after weights are loaded
    sources        whole tensors off the files: pruned, or unpacked, on the CPU or on a GPU
    read_ahead     several of them at once, on all cores
    feeding        transformers' conversions, fed with them
    saving         transformers' conversions, packing what they give; `densify`
    zeros          masks of what was pruned, a bit a weight, and putting the zeros back
    training       `KeepSparsity` and `SparsityHold`, which hold them while a model is trained
    adapters       `merge_adapter`, which holds them while adapters are merged

transformers calls every ``quantization_config`` a quantization; nothing here quantizes. The model
that comes out is an ordinary one: dense weights with zeros, no hooks, no modules of ours.
"""
