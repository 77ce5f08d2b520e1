"""The structure of a checkpoint's model, and which of its tensors are targets.

auto_class       the class of transformers that loads it
meta_model       the model without its weights, on the meta device
places           what each parameter of the model is
landing          the parameter that each tensor of the checkpoint is loaded into
wrapped_names    names that a wrapper around the model has changed
stored_forms     weights that are quantized or empty, though the config does not say so
completeness     what the model needs and the checkpoint lacks
targets          which tensors are targets, and why the others are not
question         a question that a process of its own answers
targets_process  decides the targets in a process of its own
"""
