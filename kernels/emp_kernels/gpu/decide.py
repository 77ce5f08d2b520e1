"""Steps over one row of weights, tile by tile: its sums, its count, and what is kept of it.

A row's C weights lie side by side from `row_ptr` on. Each step reads it from its beginning: the
first from the device's memory, those that follow from its caches.
"""

import triton
import triton.language as tl

from emp_kernels.gpu.common import magnitudes

__all__ = [
    "DOUBTFUL",
    "GIVEN",
    "NOT_FINITE",
    "PER_ROW",
    "THRESHOLD",
    "decide_row",
    "keys_of_tile",
    "tile_keeps",
]

PER_ROW = tl.constexpr(0)
THRESHOLD = tl.constexpr(1)
GIVEN = tl.constexpr(2)
"""What says which weights stay: each row by itself, a threshold for all rows, or a mask."""

NOT_FINITE = tl.constexpr(1)
DOUBTFUL = tl.constexpr(2)
"""Why a row was not worked on: it holds NaN or infinity; or float64 cannot decide its count."""


@triton.jit
def keys_of_tile(row_ptr, start, COLUMNS: tl.constexpr, KEY_MASK: tl.constexpr, TILE: tl.constexpr):
    """A tile of a row: the patterns as they are stored, their keys, int32, and which are none.

    Past the row's end patterns and keys are 0.
    """
    column_T = start + tl.arange(0, TILE)
    inside_T = column_T < COLUMNS
    pattern_T = tl.load(row_ptr + column_T, mask=inside_T, other=0)
    return pattern_T, (pattern_T & KEY_MASK).to(tl.int32), inside_T


@triton.jit
def _row_sums(
    row_ptr,
    window,
    WITH_WINDOW: tl.constexpr,
    BINS: tl.constexpr,
    SHIFT: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    MANTISSA: tl.constexpr,
    SCALE: tl.constexpr,
    TILE: tl.constexpr,
):
    """What one read of a row tells.

    The order of the sums does not matter: see `emp_kernels.counting`.

    Returns:
        (largest key, Σ magnitudes, Σ their squares, how many keys lie in each of BINS bins from
        bin `window` on, how many lie above these). A bin is the keys that are equal but for their
        lowest SHIFT bits. The latter two are zero without a window.
    """
    largest_T = tl.zeros([TILE], tl.int32)
    s1_T = tl.zeros([TILE], tl.float64)
    s2_T = tl.zeros([TILE], tl.float64)
    above_T = tl.zeros([TILE], tl.int32)
    count_B = tl.zeros([BINS], tl.int32)
    for start in range(0, COLUMNS, TILE):
        _, key_T, inside_T = keys_of_tile(row_ptr, start, COLUMNS, KEY_MASK, TILE)
        largest_T = tl.maximum(largest_T, key_T)
        magnitude_T = magnitudes(key_T, MANTISSA, SCALE)
        s1_T += magnitude_T
        s2_T += magnitude_T * magnitude_T
        if WITH_WINDOW:
            bin_T = (key_T >> SHIFT) - window
            above_T += (bin_T >= BINS).to(tl.int32)
            in_window_T = (bin_T.to(tl.uint32, bitcast=True) < BINS) & inside_T
            count_B += tl.histogram(bin_T, BINS, mask=in_window_T)
    return tl.max(largest_T, 0), tl.sum(s1_T, 0), tl.sum(s2_T, 0), count_B, tl.sum(above_T, 0)


@triton.jit
def _count_kept(s1, s2, beta_slack, COLUMNS: tl.constexpr):
    """`emp_kernels.counting.trusted_count`, int32, with −1 for None.

    Args:
        s1: Sum of the magnitudes, float64.
        s2: Sum of their squares, float64.
        beta_slack: β · slack, float64.
        COLUMNS: How many weights there are.
    """
    n = tl.full([], COLUMNS, tl.float64)
    unit = (tl.full([], 1023 - 53, tl.int64) << 52).to(tl.float64, bitcast=True)
    count = tl.full([], COLUMNS, tl.int32)
    if s2 == 0.0:
        count = tl.full([], 0, tl.int32)
    else:
        estimate = beta_slack * (s1 * s1 / s2)
        if estimate < n + n:
            error = estimate * (tl.full([], 3 * COLUMNS + 16, tl.float64) * unit)
            low = tl.minimum(estimate - error, n).to(tl.int32)
            high = tl.minimum(estimate + error, n).to(tl.int32)
            count = tl.where(low == high, tl.minimum(tl.maximum(low, 1), COLUMNS), -1)
    return count


@triton.jit
def _count_at(row_ptr, key, COLUMNS: tl.constexpr, KEY_MASK: tl.constexpr, TILE: tl.constexpr):
    """How many keys of a row reach a key of 1 or more, and how many exceed it."""
    count_T = tl.zeros([TILE], tl.int32)  # two counts in one: of no more than 2**15 tiles each
    for start in range(0, COLUMNS, TILE):
        _, key_T, _ = keys_of_tile(row_ptr, start, COLUMNS, KEY_MASK, TILE)
        count_T += (key_T >= key).to(tl.int32) + ((key_T > key).to(tl.int32) << 16)
    return tl.sum(count_T & 0xFFFF, 0), tl.sum(count_T >> 16, 0)


@triton.jit
def _find_kth(
    row_ptr,
    k,
    low,
    high,
    reach_low,
    reach_high,
    COLUMNS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    TILE: tl.constexpr,
):
    """The k-th largest key of a row, 1 ≤ k ≤ C.

    It is tried where a straight line between the two counts that enclose k says that it lies, and
    each third time in the middle, so that the search ends soon whatever the row holds.

    Args:
        row_ptr: The row.
        k: Which one.
        low: A key that it reaches.
        high: A key that it does not reach.
        reach_low: How many keys reach low: k or more.
        reach_high: How many reach high: fewer.

    Returns:
        (the key, how many of the keys that equal it are among the k largest, C where all are).
    """
    tries = tl.full([], 0, tl.int32)
    while (high - low > 1) & (reach_low > k):
        span = (high - low).to(tl.float32)
        ahead = (reach_low - k).to(tl.float32)
        step = span * (ahead / tl.maximum(reach_low - reach_high, 1).to(tl.float32))
        if tries % 3 == 2:
            step = span * 0.5
        probe = low + tl.minimum(tl.maximum(step.to(tl.int32), 1), high - low - 1)
        reach, exceed = _count_at(row_ptr, probe, COLUMNS, KEY_MASK, TILE)
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
    if reach_low == k:  # all keys that reach low, and the least of them is the one
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
def _kth_in_window(
    row_ptr,
    k,
    largest,
    window,
    count_B,
    above,
    SHIFT: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    TILE: tl.constexpr,
):
    """As `_find_kth`, from what `_row_sums` has counted; arguments are its results."""
    low = tl.full([], 0, tl.int32)
    high = largest + 1
    reach_low = tl.full([], COLUMNS, tl.int32)
    reach_high = tl.full([], 0, tl.int32)
    reach_B = tl.cumsum(count_B, 0, reverse=True) + above
    enough_B = reach_B >= k
    bin_ = tl.sum(enough_B.to(tl.int32), 0) - 1
    if (bin_ >= 0) & (above < k):
        low = (window + bin_) << SHIFT
        high = (window + bin_ + 1) << SHIFT
        reach_low = tl.min(tl.where(enough_B, reach_B, COLUMNS), 0)
        reach_high = tl.max(tl.where(enough_B, above, reach_B), 0)
    return _find_kth(row_ptr, k, low, high, reach_low, reach_high, COLUMNS, KEY_MASK, TILE)


@triton.jit
def decide_row(
    row_ptr,
    beta_ptr,
    limit_ptr,
    threshold,
    guess,
    RULE: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    INFINITY: tl.constexpr,
    MANTISSA: tl.constexpr,
    SCALE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Decide what is kept of a row.

    Args:
        row_ptr: The row.
        beta_ptr: float64, β · slack; for PER_ROW.
        limit_ptr: int32 of this row. PER_ROW: how many stay, −1 where the rule says. THRESHOLD:
            how many of the keys that equal it stay, C for all.
        threshold: For THRESHOLD.
        guess: A threshold that is likely to be near this row's.
        RULE: PER_ROW, THRESHOLD or GIVEN.

    Returns:
        (k, threshold, end, Σs, Σs², fault): k is −1 where it is not known yet, and 0 with a fault;
        kept are keys above the threshold, and those that equal it in the first `end` columns.
    """
    BINS: tl.constexpr = 512 if MANTISSA == 10 else 128  # half a binade, or one
    SHIFT: tl.constexpr = 16 if MANTISSA == 23 else 0
    window = tl.maximum((guess >> SHIFT) - BINS // 2, 0)
    largest, s1, s2, count_B, above = _row_sums(
        row_ptr,
        window,
        RULE == PER_ROW,
        BINS,
        SHIFT,
        COLUMNS,
        KEY_MASK,
        MANTISSA,
        SCALE,
        TILE,
    )
    fault = (largest >= INFINITY).to(tl.int32) * NOT_FINITE
    k = tl.full([], -1, tl.int32)
    cut = tl.full([], 0, tl.int32) + guess
    ties = tl.full([], COLUMNS, tl.int32)
    if RULE == THRESHOLD:
        cut = tl.full([], 0, tl.int32) + threshold
        ties = tl.load(limit_ptr)
    if fault != 0:
        k = tl.full([], 0, tl.int32)
    if RULE == PER_ROW:
        if fault == 0:
            k = tl.load(limit_ptr)
            if k < 0:
                k = _count_kept(s1, s2, tl.load(beta_ptr), COLUMNS)
            if k < 0:
                fault = tl.full([], DOUBTFUL, tl.int32)
                k = tl.full([], 0, tl.int32)
            if k > 0:
                cut, ties = _kth_in_window(
                    row_ptr,
                    k,
                    largest,
                    window,
                    count_B,
                    above,
                    SHIFT,
                    COLUMNS,
                    KEY_MASK,
                    TILE,
                )
    end = _tie_end(row_ptr, cut, ties, COLUMNS, KEY_MASK, TILE)
    return k, cut, end, s1, s2, fault


@triton.jit
def _given_bits(given_ptr, start, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """What a mask says of a tile's weights, int32: 1 for those that stay."""
    column_T = start + tl.arange(0, TILE)
    byte_T = tl.load(given_ptr + (column_T >> 3), mask=column_T < COLUMNS, other=0)
    return (byte_T.to(tl.int32) >> (column_T & 7)) & 1


@triton.jit
def _tie_end(
    row_ptr,
    cut,
    ties,
    COLUMNS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    TILE: tl.constexpr,
):
    """The number of leading columns that hold the first `ties` keys equal to the threshold."""
    end = tl.where(ties > 0, COLUMNS, 0)
    if (ties > 0) & (ties < COLUMNS):
        start = tl.full([], 0, tl.int32)
        left = tl.full([], 0, tl.int32) + ties
        while left > 0:
            _, key_T, inside_T = keys_of_tile(row_ptr, start, COLUMNS, KEY_MASK, TILE)
            tie_T = ((key_T == cut) & inside_T).to(tl.int32)
            here = tl.sum(tie_T, 0)
            if here >= left:
                last_T = (tl.cumsum(tie_T, 0) == left) & (tie_T > 0)
                column_T = start + tl.arange(0, TILE)
                end = tl.min(tl.where(last_T, column_T, COLUMNS), 0) + 1
            left -= here
            start += TILE
    return end


@triton.jit
def tile_keeps(
    row_ptr,
    given_ptr,
    start,
    cut,
    end,
    RULE: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Which weights of a tile stay.

    Args:
        row_ptr: The row.
        given_ptr: Its mask, for GIVEN.
        start: The tile's first column.
        cut: The threshold.
        end: Keys that equal it stay in so many leading columns; see `_tie_end`.

    Returns:
        (patterns, keys, bool which stay).
    """
    pattern_T, key_T, inside_T = keys_of_tile(row_ptr, start, COLUMNS, KEY_MASK, TILE)
    if RULE == GIVEN:
        keep_T = _given_bits(given_ptr, start, COLUMNS, TILE) != 0
    else:
        needed_T = cut + (start + tl.arange(0, TILE) >= end).to(tl.int32)
        keep_T = (key_T >= needed_T) & inside_T
    return pattern_T, key_T, keep_T
