"""The CPU kernels, compiled by numba when they are first used and cached on disk."""
