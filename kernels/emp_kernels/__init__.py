"""The rule and the packed rows: reference, CPU kernels and their dispatch."""
