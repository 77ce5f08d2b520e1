"""Loops that count bit patterns, for `emp_kernels.histogram`."""

import numba
import numpy as np

from emp_kernels.cpu.select import CHUNK, count_ties

__all__ = ["count_bins", "count_equal", "count_keys", "count_low_parts"]

_njit = numba.njit(nogil=True, cache=True)


@_njit
def count_keys(w_N, key_mask, counts):
    """Count the keys of 16-bit weights, int64 [2**15], added to."""
    for i in range(w_N.size):
        counts[w_N[i] & key_mask] += 1


@_njit
def count_bins(w_N, key_mask, counts, low_sums, low_squares):
    """Count 32-bit keys by their upper 15 bits, with sums and squares of the lower 16."""
    for i in range(w_N.size):
        key = w_N[i] & key_mask
        low = np.uint64(key & 0xFFFF)
        bin_ = key >> 16
        counts[bin_] += 1
        low_sums[bin_] += low
        low_squares[bin_] += low * low


@_njit
def count_low_parts(w_N, key_mask, chosen_bin, counts):
    """Count the lower 16 bits of the 32-bit keys in one bin, int64 [2**16], added to."""
    for i in range(w_N.size):
        key = np.int64(w_N[i] & key_mask)
        if key >> 16 == chosen_bin:
            counts[key & 0xFFFF] += 1


@_njit
def count_equal(w_N, key_mask, threshold):
    """How many keys equal `threshold`."""
    tied = w_N.dtype.type(threshold)
    total = np.int64(0)
    for start in range(0, w_N.size, CHUNK):
        total += count_ties(w_N[start : start + CHUNK], key_mask, tied)
    return total
