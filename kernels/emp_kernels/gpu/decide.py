"""Steps over one row of weights, tile by tile: its sums, its count, and which of them stay.

A row's C weights lie side by side from `row_ptr` on. Each step reads it from its beginning: the
first from the device's memory, those that follow from its caches.
"""

import triton
import triton.language as tl

from emp_kernels.gpu.common import (
    keys_at,
    keys_of_tile,
    magnitudes,
    power_of_two,
    unscaled_magnitudes,
)
from emp_kernels.gpu.search import enclose_in_window, find_kth

__all__ = [
    "DOUBTFUL",
    "GIVEN",
    "NOT_FINITE",
    "PER_ROW",
    "THRESHOLD",
    "columns_of_tile",
    "decide_row",
    "first_guess",
    "tile_keeps",
]

PER_ROW = tl.constexpr(0)
THRESHOLD = tl.constexpr(1)
GIVEN = tl.constexpr(2)
"""What decides which weights stay: each row by itself, a threshold for all rows, or a mask."""

NOT_FINITE = tl.constexpr(1)
DOUBTFUL = tl.constexpr(2)
"""Why a row was left out: it holds NaN or infinity, or float64 cannot decide its count."""


@triton.jit
def first_guess(
    w_ptr,
    row,
    rows,
    row_stride,
    RULE: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    MANTISSA: tl.constexpr,
    TILE: tl.constexpr,
):
    """A guess of the threshold of the first row that a program works on; 0 where none is needed."""
    guess = tl.full([], 0, tl.int32)
    if RULE == PER_ROW:
        if row < rows:
            first_ptr = w_ptr + row.to(tl.int64) * row_stride
            guess = _guess_threshold(first_ptr, COLUMNS, KEY_MASK, MANTISSA, TILE)
    return guess


@triton.jit
def _guess_threshold(
    row_ptr,
    COLUMNS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    MANTISSA: tl.constexpr,
    TILE: tl.constexpr,
):
    """A key near the threshold, if a row is like its first tile and its weights are Gaussian.

    Then β = 1 keeps N_eff, 2/π of the weights, and these are the ones above 0.59 of the mean
    magnitude: erfc(t / √2) = 2/π at t = 0.472 σ, and the mean is √(2/π) σ = 0.798 σ.
    """
    _, key_T, _ = keys_of_tile(row_ptr, 0, COLUMNS, KEY_MASK, TILE)
    COUNT: tl.constexpr = TILE if TILE < COLUMNS else COLUMNS
    typical = tl.sum(unscaled_magnitudes(key_T, MANTISSA), 0) * (0.59 / COUNT)
    return (typical.to(tl.int64, bitcast=True) >> (52 - MANTISSA)).to(tl.int32)


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
    """Sum a row, and count its keys by bins, in one read.

    The order of the sums does not matter: see `emp_kernels.counting`.

    Returns:
        (Σ magnitudes, Σ their squares, how many keys lie in each of BINS bins from bin `window`
        on). A bin is the keys that are equal but for their lowest SHIFT bits. The first one counts
        all keys below it too, and what is past the row's end; the last one all keys above it. All
        counts are zero without a window.
    """
    s1_T = tl.zeros([TILE], tl.float64)
    s2_T = tl.zeros([TILE], tl.float64)
    count_B = tl.zeros([BINS], tl.int32)
    for start in range(0, COLUMNS, TILE):
        _, key_T, _ = keys_of_tile(row_ptr, start, COLUMNS, KEY_MASK, TILE)
        magnitude_T = magnitudes(key_T, MANTISSA, SCALE)
        s1_T += magnitude_T
        s2_T += magnitude_T * magnitude_T
        if WITH_WINDOW:
            bin_T = tl.minimum(tl.maximum((key_T >> SHIFT) - window, 0), BINS - 1)
            count_B += tl.histogram(bin_T, BINS)
    return tl.sum(s1_T, 0), tl.sum(s2_T, 0), count_B


@triton.jit
def _largest_key(row_ptr, COLUMNS: tl.constexpr, KEY_MASK: tl.constexpr, TILE: tl.constexpr):
    largest_T = tl.zeros([TILE], tl.int32)
    for start in range(0, COLUMNS, TILE):
        _, key_T, _ = keys_of_tile(row_ptr, start, COLUMNS, KEY_MASK, TILE)
        largest_T = tl.maximum(largest_T, key_T)
    return tl.max(largest_T, 0)


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
    unit = power_of_two(-53)
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
def decide_row(
    row_ptr,
    beta_ptr,
    limit_ptr,
    threshold,
    guess,
    RULE: tl.constexpr,
    WITH_WINDOW: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    INFINITY: tl.constexpr,
    MANTISSA: tl.constexpr,
    SCALE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Decide which weights of a row stay.

    Args:
        row_ptr: The row.
        beta_ptr: float64, β · slack; for PER_ROW.
        limit_ptr: int32 of this row. PER_ROW: how many weights stay, −1 where the rule says.
            THRESHOLD: how many of the keys that equal the threshold stay, C for all.
        threshold: For THRESHOLD.
        guess: A threshold that is likely to be near this row's.
        RULE: PER_ROW, THRESHOLD or GIVEN.
        WITH_WINDOW: Whether the read that sums also counts the keys near the guess by bins: then
            the search starts between two neighbouring bins. Where `tl.histogram` is slow, it starts
            at the guess instead.

    Returns:
        (k, threshold, end, Σs, Σs², fault): k weights stay; it is −1 where the rule does not count
        them, and 0 with a fault. Keys above the threshold stay, and those that equal it in the
        first `end` columns.
    """
    BINS: tl.constexpr = 512 if MANTISSA == 10 else 128  # half a binade, or one
    SHIFT: tl.constexpr = 16 if MANTISSA == 23 else 0
    window = tl.maximum((guess >> SHIFT) - BINS // 2, 0)
    s1, s2, count_B = _row_sums(
        row_ptr,
        window,
        WITH_WINDOW and RULE == PER_ROW,
        BINS,
        SHIFT,
        COLUMNS,
        KEY_MASK,
        MANTISSA,
        SCALE,
        TILE,
    )
    # A row with NaN or infinity has a sum of at least infinity's pattern read as a number, for that
    # is how `magnitudes` reads it. Only rows with so large a sum are read again for the reason.
    fault = tl.full([], 0, tl.int32)
    if s1 >= tl.max(magnitudes(tl.full([1], INFINITY, tl.int32), MANTISSA, SCALE), 0):
        largest = _largest_key(row_ptr, COLUMNS, KEY_MASK, TILE)
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
                low = tl.full([], 0, tl.int32)
                high = tl.full([], INFINITY, tl.int32)
                reach_low = tl.full([], COLUMNS, tl.int32)
                reach_high = tl.full([], 0, tl.int32)
                if WITH_WINDOW:
                    low, high, reach_low, reach_high = enclose_in_window(
                        k, window, count_B, BINS, SHIFT, COLUMNS, INFINITY
                    )
                cut, ties = find_kth(
                    row_ptr,
                    k,
                    guess,
                    low,
                    high,
                    reach_low,
                    reach_high,
                    not WITH_WINDOW,
                    COLUMNS,
                    KEY_MASK,
                    MANTISSA,
                    TILE,
                )
    end = _tie_end(row_ptr, cut, ties, COLUMNS, KEY_MASK, TILE)
    return k, cut, end, s1, s2, fault


@triton.jit
def _tie_end(
    row_ptr,
    cut,
    ties,
    COLUMNS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    TILE: tl.constexpr,
):
    """The number of leading columns that hold the first `ties` keys equal to the threshold.

    Few rows need a search: mostly all keys that equal the threshold stay, or none.
    """
    end = tl.where(ties > 0, COLUMNS, 0)
    if (ties > 0) & (ties < COLUMNS):
        start = tl.full([], 0, tl.int32)
        left = tl.full([], 0, tl.int32) + ties
        here = _ties(row_ptr, start, cut, COLUMNS, KEY_MASK, TILE)
        count = tl.sum(here, 0)
        while (count < left) & (start + TILE < COLUMNS):
            left -= count
            start += TILE
            here = _ties(row_ptr, start, cut, COLUMNS, KEY_MASK, TILE)
            count = tl.sum(here, 0)
        end = start + tl.sum((tl.cumsum(here, 0) < left).to(tl.int32), 0) + 1
    return end


@triton.jit
def _ties(row_ptr, start, cut, COLUMNS: tl.constexpr, KEY_MASK: tl.constexpr, TILE: tl.constexpr):
    """1 for each weight of a tile that equals the threshold, else 0."""
    _, key_T, inside_T = keys_of_tile(row_ptr, start, COLUMNS, KEY_MASK, TILE)
    return ((key_T == cut) & inside_T).to(tl.int32)


@triton.jit
def columns_of_tile(start, TILE: tl.constexpr):
    """A tile's columns, [8, N]: a chunk of eight, a byte of the mask, is one column of these.

    Triton gives each thread whole chunks then: what is summed over a chunk stays in one thread, and
    the thread loads its 16 bytes of 16-bit weights at once.
    """
    return start + tl.arange(0, TILE // 8)[None, :] * 8 + tl.arange(0, 8)[:, None]


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
        (patterns, keys of those that stay, 1 for these and 0 for others), each [8, N].
    """
    WHOLE: tl.constexpr = COLUMNS % TILE == 0
    column_8N = columns_of_tile(start, TILE)
    pattern_8N, key_8N, inside_8N = keys_at(row_ptr, column_8N, COLUMNS, KEY_MASK, WHOLE)
    if RULE == GIVEN:
        chunk_N = start // 8 + tl.arange(0, TILE // 8)
        byte_N = tl.load(given_ptr + chunk_N, mask=chunk_N * 8 < COLUMNS, other=0).to(tl.int32)
        keep_8N = (byte_N[None, :] >> tl.arange(0, 8)[:, None]) & 1
    else:
        # only in the one tile that holds column `end` the threshold is not the same for all columns
        if (start < end) & (end < start + TILE):
            key_8N = tl.where((key_8N == cut) & (column_8N >= end), -1, key_8N)
        keep_8N = (key_8N >= cut + (end <= start).to(tl.int32)).to(tl.int32)
    if not WHOLE:
        keep_8N = keep_8N & inside_8N.to(tl.int32)
    return pattern_8N, key_8N, keep_8N
