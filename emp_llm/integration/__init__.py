"""emp-llm inside transformers: pruning while loading, packed checkpoints, and fine-tuning.

configs          `EmpConfig`, and what a packed checkpoint's config.json says
keeping          weights that stay packed in memory
weight_feed      transformers' weight conversions, fed with pruned, unpacked or packed tensors
saving           transformers' weight conversions, which pack what they give; `densify`
zero_mask        masks of zeros, one bit a weight
zeros            the pruned parameters of a model, found and set to zero again
training         `KeepSparsity` and `SparsityHold`, which keep the zeros while a model is trained
adapters         `merge_adapter`, which keeps them while adapters are merged
quantizers       what happens before, while and after weights are loaded
delta_quantizer  the same for a delta, whose base is loaded with it
save_call        a call of `save_pretrained`: what it packs, and whether config.json says so
registration     makes `configs`, the quantizers and `save_call` known to transformers
autoload         has `registration` do so once transformers is imported

``quantization_config`` is transformers' name; nothing here quantizes. The loaded model is an
ordinary one: dense weights with zeros in them, no hooks, no modules of emp-llm. With
``keep_packed`` the only difference is in its parameters: see `emp_llm.resident`.
"""
