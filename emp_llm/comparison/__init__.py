"""Fair controls: what other choices of the same number of weights cost.

    allocation     how many weights each group keeps, for a given total
    pq_index       the PQ index of Diao et al., as a count for each group
    control_model  a model loaded with the weights that a control keeps
    bench          one model in memory at a time, measured
    costs          what was measured
    choices        the controls
    plot           the same as a picture

A control keeps, of the very tensors that EMP prunes, exactly as many weights as EMP.
"""
