"""Recovery: a short training of what pruning left, towards the logits of the dense model.

memory          whether there is room for it, before any work is done
divergence      how far logits are from the dense model's, and the gradient of that
trained_weight  a parameter in training: its float32 values, its zeros, and Adam's moments
trained_model   the whole model in memory, with pruned weights and dense ones in turn
saved_state     the state of a training on disk, from which a run that was killed goes on
training        the steps
recover         all steps, in order; the result goes where masks and repaired weights lie

Unlike in a calibration the whole model is in memory.
"""
