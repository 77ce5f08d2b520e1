"""The k-th largest key of a row: enclosed by counts of its bins, then searched for by counting."""

import triton
import triton.language as tl

from emp_kernels.gpu.common import keys_of_tile

__all__ = ["enclose_in_window", "find_kth"]


@triton.jit
def _count_at(row_ptr, key, COLUMNS: tl.constexpr, KEY_MASK: tl.constexpr, TILE: tl.constexpr):
    """How many keys of a row reach a key of 1 or more, and how many exceed it."""
    count_T = tl.zeros([TILE], tl.int32)  # two counts in one: of no more than 2**15 tiles each
    for start in range(0, COLUMNS, TILE):
        _, key_T, _ = keys_of_tile(row_ptr, start, COLUMNS, KEY_MASK, TILE)
        count_T += (key_T >= key).to(tl.int32) + ((key_T > key).to(tl.int32) << 16)
    return tl.sum(count_T & 0xFFFF, 0), tl.sum(count_T >> 16, 0)


@triton.jit
def find_kth(
    row_ptr,
    k,
    guess,
    low,
    high,
    reach_low,
    reach_high,
    WITH_GUESS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    MANTISSA: tl.constexpr,
    TILE: tl.constexpr,
):
    """The k-th largest key of a row, 1 ≤ k ≤ C.

    It is tried where a straight line between the two counts that enclose k says that it lies, and
    each third time in the middle, so that the search ends soon whatever the row holds. With a guess
    that is tried first, and then where the key should be if a binade held a quarter of the row.

    Args:
        row_ptr: The row.
        k: Which one.
        guess: A key that is likely to be near it.
        low: A key that it reaches.
        high: A key that it does not reach.
        reach_low: How many keys reach low: k or more.
        reach_high: How many reach high: fewer.
        WITH_GUESS: Whether to try the guess.

    Returns:
        (the key, how many of the keys that equal it are among the k largest, C where all are).
    """
    tries = tl.full([], 0 if WITH_GUESS else 2, tl.int32)
    last = tl.full([], 0, tl.int32)
    while (high - low > 1) & (reach_low > k):
        span = (high - low).to(tl.float32)
        step = span * 0.5
        if tries == 0:
            step = (guess - low).to(tl.float32)
        elif tries == 1:  # `last` lies where the search has not come closer, or next to it
            step = (guess - low).to(tl.float32) + (last - k).to(tl.float32) * (
                (4 << MANTISSA) / COLUMNS
            )
        elif tries % 3 != 1:
            ahead = (reach_low - k).to(tl.float32)
            step = span * (ahead / tl.maximum(reach_low - reach_high, 1).to(tl.float32))
        step = tl.minimum(tl.maximum(step, 1.0), span)  # float32 may be too large for int32
        probe = low + tl.minimum(tl.maximum(step.to(tl.int32), 1), high - low - 1)
        reach, exceed = _count_at(row_ptr, probe, COLUMNS, KEY_MASK, TILE)
        last = reach
        if exceed >= k:
            low = probe + 1
            reach_low = exceed
        else:
            high = probe
            reach_high = reach
            if reach >= k:
                low = probe
                reach_low = reach
                high = probe + 1
                reach_high = exceed
        tries += 1
    if (reach_low == k) & (high - low > 1):  # all that reach low, and the least of them is the one
        low = _least_key(row_ptr, low, COLUMNS, KEY_MASK, TILE)
    return low, tl.where(reach_low == k, COLUMNS, k - reach_high)


@triton.jit
def _least_key(row_ptr, low, COLUMNS: tl.constexpr, KEY_MASK: tl.constexpr, TILE: tl.constexpr):
    """The least key of a row that reaches `low`, which one does."""
    least_T = tl.full([TILE], KEY_MASK, tl.int32)
    for start in range(0, COLUMNS, TILE):
        _, key_T, inside_T = keys_of_tile(row_ptr, start, COLUMNS, KEY_MASK, TILE)
        reaches_T = (key_T >= low) & inside_T
        least_T = tl.minimum(least_T, tl.where(reaches_T, key_T, KEY_MASK))
    return tl.min(least_T, 0)


@triton.jit
def enclose_in_window(
    k,
    window,
    count_B,
    BINS: tl.constexpr,
    SHIFT: tl.constexpr,
    COLUMNS: tl.constexpr,
    INFINITY: tl.constexpr,
):
    """What one read of a row has counted, as low, high, reach_low and reach_high for `find_kth`."""
    reach_B = tl.cumsum(count_B, 0, reverse=True)
    enough_B = reach_B >= k
    bin_ = tl.sum(enough_B.to(tl.int32), 0) - 1
    low = tl.where(bin_ > 0, (window + bin_) << SHIFT, 0)
    high = tl.where(bin_ < BINS - 1, (window + bin_ + 1) << SHIFT, INFINITY)
    reach_low = tl.min(tl.where(enough_B, reach_B, COLUMNS), 0)
    return low, high, reach_low, tl.max(tl.where(enough_B, 0, reach_B), 0)
