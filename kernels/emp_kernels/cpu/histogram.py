"""Exact histograms of keys: what `layer` and `model` granularity need to know of the weights.

A 16-bit format has 32,768 keys, so counts of them say everything. A 32-bit key is split into its
upper 15 bits, the *bin*, and its lower 16: counts and moments of the lower part in each bin give
exact sums, and a second pass over one bin the exact threshold.
"""

import numba
import numpy as np

__all__ = [
    "BINS",
    "LOW_BITS",
    "count_equal",
    "count_low_parts",
    "count_patterns",
    "largest_pattern",
]

_njit = numba.njit(nogil=True, cache=True)

BINS = 1 << 15
LOW_BITS = 16


@_njit
def largest_pattern(w_N, key_mask):
    """The largest key; 0 for none."""
    largest = w_N.dtype.type(0)
    for i in range(w_N.size):
        largest = max(largest, w_N.dtype.type(w_N[i] & key_mask))
    return np.int64(largest)


@_njit
def count_patterns(w_N, key_mask, bin_shift, counts, low_sums, low_squares):
    """Add keys to a histogram.

    Args:
        w_N: uint16 or uint32 [N], bit patterns, N < 2**31.
        key_mask: all bits but the sign, as w_N's dtype.
        bin_shift: 0 for 16-bit weights, LOW_BITS for 32-bit ones.
        counts: int64 [BINS], added to.
        low_sums: uint64 [BINS], sums of the lower parts, added to.
        low_squares: uint64 [BINS], sums of their squares, added to.
    """
    shift = np.uint64(bin_shift) & np.uint64(8 * w_N.itemsize - 1)
    low_mask = (np.uint64(1) << shift) - np.uint64(1)
    if not low_mask:
        for i in range(w_N.size):
            counts[w_N[i] & key_mask] += 1
        return
    for i in range(w_N.size):
        key = np.uint64(w_N[i] & key_mask)
        low = key & low_mask
        counts[key >> shift] += 1
        low_sums[key >> shift] += low
        low_squares[key >> shift] += low * low


@_njit
def count_low_parts(w_N, key_mask, chosen_bin, counts):
    """Add the lower parts of the uint32 keys in one bin to counts, int64 [2**LOW_BITS]."""
    for i in range(w_N.size):
        key = np.int64(w_N[i] & key_mask)
        if key >> LOW_BITS == chosen_bin:
            counts[key & ((1 << LOW_BITS) - 1)] += 1


@_njit
def count_equal(w_N, key_mask, threshold):
    """How many keys equal `threshold`."""
    total = 0
    tied = w_N.dtype.type(threshold)
    for start in range(0, w_N.size, 16384):
        count = np.uint16(0)
        for i in range(start, min(start + 16384, w_N.size)):
            count = np.uint16(count + np.uint16((w_N[i] & key_mask) == tied))
        total += np.int64(count)
    return total
