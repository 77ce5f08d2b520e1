"""A checkpoint's model, built from its config on the meta device: which tensors are targets.

auto_class       the transformers class that loads it
meta_model       the model without its weights
places           what each parameter is
landing          the parameter that each tensor becomes
targets          which tensors are pruned, and why not the others
targets_process  the same in a process that ends, with all that transformers imports
"""
