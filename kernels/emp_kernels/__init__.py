"""The rule and the packed rows: reference, CPU kernels and their dispatch.

Knows nothing of checkpoints or of transformers. `dispatch` is the way in.
"""
