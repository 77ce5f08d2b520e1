"""Fair controls: what other choices of the same number of weights cost.

    allocation   how many weights each group keeps, so that all together keep a given number
    compressible the PQ index of Diao et al., as a count for each group
    loading      a model loaded with the weights that a control keeps, and no others
    comparison   `compare`: dense, EMP, and every control at EMP's own sparsity
    plot         the same as a picture

A control keeps, of the very tensors that EMP prunes, exactly as many weights as EMP.
"""
