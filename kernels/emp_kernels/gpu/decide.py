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
    "tile_places",
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
    COLUMNS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    MANTISSA: tl.constexpr,
    SCALE: tl.constexpr,
    TILE: tl.constexpr,
):
    """The largest key of a row, the sum of its magnitudes and that of their squares, float64.

    The order of the sums does not matter: see `emp_kernels.counting`.
    """
    largest_T = tl.zeros([TILE], tl.int32)
    s1_T = tl.zeros([TILE], tl.float64)
    s2_T = tl.zeros([TILE], tl.float64)
    for start in range(0, COLUMNS, TILE):
        _, key_T, _ = keys_of_tile(row_ptr, start, COLUMNS, KEY_MASK, TILE)
        largest_T = tl.maximum(largest_T, key_T)
        magnitude_T = magnitudes(key_T, MANTISSA, SCALE)
        s1_T += magnitude_T
        s2_T += magnitude_T * magnitude_T
    return tl.max(largest_T, 0), tl.sum(s1_T, 0), tl.sum(s2_T, 0)


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
    largest,
    guess,
    COLUMNS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    MANTISSA: tl.constexpr,
    TILE: tl.constexpr,
):
    """A threshold that parts the k largest keys of a row from the others, 1 ≤ k ≤ C.

    Which keys these are depends neither on the guess nor on the way that the search takes. It ends
    at a key that exactly k keys reach, or at the k-th largest one. First it tries the guess (the
    row before has nearly the same answer), then where the answer should be if a binade held a
    quarter of the row; after that, where a straight line between the two counts that enclose k
    says, and each third time the middle, so that it ends soon whatever the row holds.

    Returns:
        (threshold, ties): kept are the keys above the threshold, and the first `ties` equal to it;
        ties is C where all of these are.
    """
    low = tl.full([], 0, tl.int32)
    high = largest + 1
    reach_low = tl.full([], COLUMNS, tl.int32)
    reach_high = tl.full([], 0, tl.int32)
    probe = tl.minimum(tl.maximum(guess, 1), largest)
    tries = tl.full([], 0, tl.int32)
    while (high - low > 1) & (reach_low > k):
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
        span = (high - low).to(tl.float32)
        ahead = (reach_low - k).to(tl.float32)
        step = span * (ahead / tl.maximum(reach_low - reach_high, 1).to(tl.float32))
        if tries == 0:
            keys_a_weight = (4 << MANTISSA) / COLUMNS
            step = (probe - low).to(tl.float32) + (reach - k).to(tl.float32) * keys_a_weight
            step = tl.minimum(tl.maximum(step, 1.0), span)
        if tries % 3 == 2:
            step = span * 0.5
        probe = low + tl.minimum(tl.maximum(step.to(tl.int32), 1), high - low - 1)
        probe = tl.maximum(probe, 1)
        tries += 1
    return low, tl.where(reach_low == k, COLUMNS, k - reach_high)


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
        guess: A threshold that may be near this row's.
        RULE: PER_ROW, THRESHOLD or GIVEN.

    Returns:
        (k, threshold, ties, Σs, Σs², fault): k is −1 where it is not known yet, and 0 with a fault;
        the others as for `_find_kth`.
    """
    largest, s1, s2 = _row_sums(row_ptr, COLUMNS, KEY_MASK, MANTISSA, SCALE, TILE)
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
                cut, ties = _find_kth(row_ptr, k, largest, guess, COLUMNS, KEY_MASK, MANTISSA, TILE)
    return k, cut, ties, s1, s2, fault


@triton.jit
def _given_bits(given_ptr, start, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """What a mask says of a tile's weights, int32: 1 for those that stay."""
    column_T = start + tl.arange(0, TILE)
    byte_T = tl.load(given_ptr + (column_T >> 3), mask=column_T < COLUMNS, other=0)
    return (byte_T.to(tl.int32) >> (column_T & 7)) & 1


@triton.jit
def tile_keeps(
    row_ptr,
    given_ptr,
    start,
    cut,
    ties,
    tied,
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
        ties: How many of the keys that equal it stay; C for all.
        tied: How many keys before the tile equal it, where not all of them stay.

    Returns:
        (patterns, keys, bool which stay, tied up to the tile's end).
    """
    pattern_T, key_T, inside_T = keys_of_tile(row_ptr, start, COLUMNS, KEY_MASK, TILE)
    if RULE == GIVEN:
        keep_T = _given_bits(given_ptr, start, COLUMNS, TILE) != 0
    else:
        keep_T = (key_T >= cut) & inside_T
        if ties < COLUMNS:
            tie_T = (key_T == cut) & inside_T
            number_T = tl.cumsum(tie_T.to(tl.int32), 0) + tied
            keep_T = keep_T & ((key_T > cut) | (number_T <= ties))
            tied = tl.max(number_T, 0)
    return pattern_T, key_T, keep_T, tied


@triton.jit
def tile_places(
    row_ptr,
    given_ptr,
    start,
    cut,
    ties,
    tied,
    RULE: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    TILE: tl.constexpr,
):
    """As `tile_keeps`, with the place of each weight among those of the tile that stay.

    Returns:
        (patterns, keys, bool which stay, places, how many stay, tied up to the tile's end).
    """
    pattern_T, key_T, inside_T = keys_of_tile(row_ptr, start, COLUMNS, KEY_MASK, TILE)
    if RULE == GIVEN:
        kept_T = _given_bits(given_ptr, start, COLUMNS, TILE)
        number_T = tl.cumsum(kept_T, 0)
        keep_T = kept_T != 0
        kept = tl.max(number_T, 0)
    else:
        # one scan for two counts: of keys above the threshold, and of those that equal it
        above_T = (key_T > cut) & inside_T
        tie_T = (key_T == cut) & inside_T
        both_T = tl.cumsum(above_T.to(tl.int32) + (tie_T.to(tl.int32) << 16), 0)
        both = tl.max(both_T, 0)
        before = tl.minimum(tied, ties)
        keep_T = above_T | (tie_T & ((both_T >> 16) + tied <= ties))
        number_T = (both_T & 0xFFFF) + tl.minimum((both_T >> 16) + tied, ties) - before
        kept = (both & 0xFFFF) + tl.minimum((both >> 16) + tied, ties) - before
        tied += both >> 16
    return pattern_T, key_T, keep_T, number_T - 1, kept, tied
