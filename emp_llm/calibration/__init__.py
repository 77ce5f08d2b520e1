"""Scores from data: a model walked through block by block, never whole in memory.

    options      what is asked of a calibration
    combinations which options go together
    samples      the tokens it runs on
    weights      a block's parameters, from the checkpoint's tensors, and away again
    activations  what waits between blocks, in memory or on disk
    walk         the model's own forward, stopped at every block until all samples are there
    session      a model, its samples and their walks
    collecting   what each matrix is multiplied by, and its statistics
    gradients    the loss and its gradients, one block at a time
    criteria     weights and statistics → scores
    deciding     scores → masks, by the rule
    heap         freed memory, given back
    hessian      what the inputs of a matrix have in common, damped and factored
    repair       kept weights and biases that restore a layer's outputs
    judging      one target: scored, decided on, repaired
    decisions    the masks and changed weights on disk, which the straight line prunes by
    settling     one block: decided on, or its scores set aside
    forward      the walk on which blocks are settled as samples come to them
    calibrating  all of it, in order
    beta_search  the β that a loss allows
    given        the decisions as the straight line asks for them

The rule and the straight line stay what they are: only masks, and repaired weights, come from here.
"""
