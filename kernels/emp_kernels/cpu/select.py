"""Steps over one row of weights: its sums, its k-th largest key, and the weights that are kept.

The threshold is searched for by counting, not by sorting or by a heap: to count how many keys reach
a probe is one vectorized pass over a row in the cache, 32 weights of 16 bits an instruction. If its
rows are alike, a block of bf16 takes about four passes a row, one of float32, with its longer keys,
about 35.

Legend: w_C are the bit patterns of a row of C weights (uint16 or uint32); a key is a pattern
without its sign bit, and orders as the magnitudes do (see `emp_kernels.numbers`); kept_K are the
patterns of the K weights that stay, side by side.
"""

import numba
import numpy as np

from emp_kernels.cpu.simd import VECTOR_BYTES, bits_to_f32, compress_step

__all__ = [
    "CHUNK",
    "STRETCH",
    "compress_row",
    "count_reaching",
    "count_ties",
    "kth_key",
    "largest_key",
    "row_sums",
    "tie_columns",
]

# Sums may be taken in any order, so LLVM may keep partial sums in vector lanes: a count is believed
# only where no order could change it, see emp_kernels.counting.
_sums = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})
_exact = numba.njit(nogil=True, cache=True)

CHUNK = 16384
"""Weights that are counted at a time: their counts fit 16 bits, so that LLVM counts in as many
lanes as there are weights in a vector."""

STRETCH = 128
"""Escapes are few: stretches of this many weights are passed over if they have none."""


@_exact
def largest_key(w_C, key_mask):
    """The largest key of a row; 0 for an empty one."""
    zero = w_C.dtype.type(0)
    largest = zero
    for c in range(w_C.size):
        largest = max(largest, w_C.dtype.type(w_C[c] & key_mask))
    return np.uint64(largest)


@_sums
def row_sums(w_C, key_mask, shift, scale):
    """Sum of the magnitudes and of their squares, float64, from exact terms."""
    s1 = 0.0
    s2 = 0.0
    for c in range(w_C.size):
        magnitude = np.float64(bits_to_f32(np.uint64(w_C[c] & key_mask) << shift)) * scale
        s1 += magnitude
        s2 += magnitude * magnitude
    return s1, s2


@_exact
def _count_chunk(w_C, key_mask, threshold):
    count = np.uint16(0)
    for c in range(w_C.size):
        count = np.uint16(count + np.uint16((w_C[c] & key_mask) >= threshold))
    return np.int64(count)


@_exact
def count_reaching(w_C, key_mask, threshold):
    """How many keys are at least `threshold`."""
    needed = w_C.dtype.type(threshold)
    total = np.int64(0)
    for start in range(0, w_C.size, CHUNK):
        total += _count_chunk(w_C[start : start + CHUNK], key_mask, needed)
    return total


@_exact
def count_ties(w_C, key_mask, threshold):
    """How many of at most 65,535 keys equal `threshold`."""
    count = np.uint16(0)
    for c in range(w_C.size):
        count = np.uint16(count + np.uint16((w_C[c] & key_mask) == threshold))
    return np.int64(count)


@_exact
def kth_key(w_C, key_mask, k, largest, guess):
    """The k-th largest key, 1 ≤ k ≤ C, and how many keys reach it and exceed it.

    Gallops from a guess (the row before has nearly the same answer), then bisects. The answer does
    not depend on the guess.

    Args:
        w_C: The row.
        key_mask: All bits but the sign, of w_C's dtype.
        k: Which one.
        largest: The row's largest key.
        guess: Any key.

    Returns:
        (the key, how many keys are at least as large, how many are larger).
    """
    # k or more keys reach `low`, fewer reach `high`. Each probe moves one of the two, and the step
    # doubles; a probe that would leave the two goes to the middle between them. So a guess that is
    # off by d is put right in about 2 · log2(d) counts, and no guess costs more than a bisection
    # by much.
    low, reach_low = np.int64(0), np.int64(w_C.size)
    high, reach_high = np.int64(largest) + 1, np.int64(0)
    probe, step = np.int64(guess), np.int64(1)
    while high - low > 1:
        if probe <= low or probe >= high:
            probe = (low + high) >> 1
        reaching = count_reaching(w_C, key_mask, probe)
        if reaching >= k:
            low, reach_low = probe, reaching
            probe += step
        else:
            high, reach_high = probe, reaching
            probe -= step
        step <<= 1
    return low, reach_low, reach_high


@_exact
def tie_columns(w_C, key_mask, threshold, ties):
    """The number of leading columns that hold the first `ties` keys equal to `threshold`."""
    if ties <= 0:
        return 0
    tied = w_C.dtype.type(threshold)
    start, width = 0, 256
    while start < w_C.size:
        count = count_ties(w_C[start : start + width], key_mask, tied)
        if count >= ties:
            break
        ties -= count
        start += width
    for c in range(start, w_C.size):
        if (w_C[c] & key_mask) == tied:
            ties -= 1
            if ties == 0:
                return c + 1
    return w_C.size


@_exact
def _compress_span(w_C, key_mask, threshold, kept_K, k):
    # each weight is stored, and the next one over it unless it stays: no branch to guess wrong
    for c in range(w_C.size):
        kept_K[k] = w_C[c]
        k += np.int64((w_C[c] & key_mask) >= threshold)
    return k


@_exact
def compress_row(w_C, key_mask, threshold, tie_end, kept_K, mask, mask_at, simd):
    """Write the weights that stay and the mask of the row; returns how many there are.

    Kept are keys above `threshold`, and those equal to it in the first `tie_end` columns. kept_K
    needs room for C weights and one vector; mask bits go to mask[mask_at:], whole bytes, the last
    one padded with zeros.

    With `simd` a vector of weights at a time is compressed: the lanes that stay move to its front,
    and the whole vector is stored where the ones before it end. What its rear holds is overwritten
    by the next store.
    """
    number = w_C.dtype.type
    early, late = number(threshold), number(threshold + 1)
    k = 0
    start = 0
    if simd:
        lanes = VECTOR_BYTES // w_C.itemsize
        start = w_C.size // lanes * lanes
        for c in range(0, start, lanes):
            ties = min(max(tie_end - c, 0), lanes)
            k += compress_step(
                w_C, c, np.uint64(threshold), ties, kept_K, k, mask, mask_at + (c >> 3)
            )
    turn = max(tie_end, start)
    k = _compress_span(w_C[start:turn], key_mask, early, kept_K, k)
    k = _compress_span(w_C[turn:], key_mask, late, kept_K, k)
    for c in range(start, w_C.size, 8):
        byte = 0
        for i in range(min(8, w_C.size - c)):
            needed = early if c + i < tie_end else late
            byte |= np.int64((w_C[c + i] & key_mask) >= needed) << i
        mask[mask_at + (c >> 3)] = byte
    return k
