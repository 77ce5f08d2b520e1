"""Scores from data: a model walked through block by block, never whole in memory.

    options      what is asked of a calibration
    samples      the tokens it runs on
    walk         the model's own forward, stopped at every block until all samples are there
    weights      a block's parameters, from the checkpoint's tensors, and away again
    activations  what waits between blocks, in memory or on disk
    collecting   statistics of what each matrix is multiplied by
    gradients    the loss and its gradients, one block at a time
    hessian      what the inputs of a matrix have in common, damped and factored
    criteria     weights and statistics → scores
    deciding     scores → masks, by the rule
    repair       kept weights and biases that restore a layer's outputs
    decisions    the masks and changed weights on disk, which the straight line prunes by
    calibrating  all of it, in order

The rule and the straight line stay what they are: only masks, and repaired weights, come from here.
"""
