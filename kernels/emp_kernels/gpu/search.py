"""The k-th largest key of a row: enclosed by counts of its bins, then searched for by counting.

Sorting a row would take many passes over shared memory. Counting how many keys reach a probe takes
one read of the row, which lies in the L1 or L2 cache by then. So the search tries to need few
probes; a bisection would need up to as many as a key has bits (15 or 31).
"""

import triton
import triton.language as tl

from emp_kernels.gpu.common import keys_of_tile

__all__ = ["enclose_in_window", "find_kth"]


@triton.jit
def _count_at(row_ptr, key, COLUMNS: tl.constexpr, KEY_MASK: tl.constexpr, TILE: tl.constexpr):
    """How many keys of a row reach a key of 1 or more, and how many exceed it."""
    # two counts in one register, 16 bits each: each lane counts one weight of each tile, and rows
    # have fewer than 2**15 tiles
    count_T = tl.zeros([TILE], tl.int32)
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

    `low` and `high` enclose the key, and each probe moves one of the two. Where to probe:

    - By interpolation: where a straight line between the two counts says that k lies. On rows like
      those of models that takes few probes, but a row of two far values would take very many.
    - So each third probe is in the middle: the search ends soon whatever the row holds.
    - With a guess, that is probed first, and then the key that would be the k-th largest if a
      binade held a quarter of the row: one step of Newton's method from the guess.

    It ends early once exactly k keys reach `low`: which key that is, is found by one more read.

    Args:
        row_ptr: The row.
        k: Which one.
        guess: A key that is likely to be near it.
        low: A key that the k-th largest reaches.
        high: A key that it does not reach.
        reach_low: How many keys reach low: k or more.
        reach_high: How many reach high: fewer.
        WITH_GUESS: Whether to try the guess.

    Returns:
        (the key, how many of the keys that equal it are among the k largest, C where all are).
    """
    # Count the probes: 0 is the guess, 1 the step from it; without a guess the search starts at 2.
    tries = tl.full([], 0 if WITH_GUESS else 2, tl.int32)
    last = tl.full([], 0, tl.int32)
    while (high - low > 1) & (reach_low > k):
        span = (high - low).to(tl.float32)
        step = span * 0.5
        if tries == 0:
            step = (guess - low).to(tl.float32)
        elif tries == 1:  # `last`, the count at the guess, is k off by so many weights
            step = (guess - low).to(tl.float32) + (last - k).to(tl.float32) * (
                (4 << MANTISSA) / COLUMNS
            )
        elif tries % 3 != 1:
            ahead = (reach_low - k).to(tl.float32)
            step = span * (ahead / tl.maximum(reach_low - reach_high, 1).to(tl.float32))
        step = tl.minimum(tl.maximum(step, 1.0), span)  # first as float32, which int32 may not hold
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
    if (reach_low == k) & (high - low > 1):  # the k largest are those that reach low
        low = _least_key(row_ptr, low, COLUMNS, KEY_MASK, TILE)
    return low, tl.where(reach_low == k, COLUMNS, k - reach_high)


@triton.jit
def _least_key(row_ptr, low, COLUMNS: tl.constexpr, KEY_MASK: tl.constexpr, TILE: tl.constexpr):
    """The least key of a row of those that reach `low`; at least one does."""
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
    """Enclose the k-th largest key by what one read of the row has counted.

    Args:
        k: Which one.
        window: Number of the first bin that is counted by itself, as for `_row_sums` in `decide`.
        count_B: How many keys lie in each of the BINS bins.

    Returns:
        low, high, reach_low and reach_high, as for `find_kth`.
    """
    reach_B = tl.cumsum(count_B, 0, reverse=True)
    enough_B = reach_B >= k
    bin_ = tl.sum(enough_B.to(tl.int32), 0) - 1
    low = tl.where(bin_ > 0, (window + bin_) << SHIFT, 0)
    high = tl.where(bin_ < BINS - 1, (window + bin_ + 1) << SHIFT, INFINITY)
    reach_low = tl.min(tl.where(enough_B, reach_B, COLUMNS), 0)
    return low, high, reach_low, tl.max(tl.where(enough_B, 0, reach_B), 0)
