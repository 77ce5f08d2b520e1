"""The kernel that prunes rows of weights on a GPU, or gives their masks."""

import triton
import triton.language as tl

from emp_kernels.gpu.common import power_of_two, unscaled_magnitudes
from emp_kernels.gpu.decide import columns_of_tile, decide_row, first_guess, tile_keeps

__all__ = ["prune_kernel"]


@triton.jit(do_not_specialize=["rows", "threshold"])
def prune_kernel(
    w_ptr,  # int16 or int32 [R, C], `row_stride` apart
    given_ptr,  # uint8 [R, ⌈C/8⌉] where RULE is GIVEN
    beta_ptr,  # float64 [1]: β · slack, where RULE is PER_ROW
    limit_ptr,  # int32 [R]: see `emp_kernels.gpu.decide.decide_row`
    out_ptr,  # of w's dtype [R, C], `out_stride` apart, may be w_ptr; or uint8 [R, ⌈C/8⌉] for MASK
    table_ptr,  # int64 [R, 3], written: weights kept, 0, 0
    stats_ptr,  # float64 [R, 3], written
    fault_ptr,  # int32 [R], written: 0, NOT_FINITE or DOUBTFUL
    rows,
    threshold,
    row_stride,
    out_stride,
    RULE: tl.constexpr,
    WITH_WINDOW: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    INFINITY: tl.constexpr,
    MANTISSA: tl.constexpr,
    SCALE: tl.constexpr,
    MASK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Prune all rows but those with a fault; a program takes every `num_programs`-th one.

    With MASK bits are written instead of weights. A row with a fault keeps its weights: they may be
    pruned in place, and a second launch needs them where float64 could not decide a count.
    """
    N: tl.constexpr = TILE // 8
    MASK_BYTES: tl.constexpr = (COLUMNS + 7) // 8
    zero = tl.full([], 0, tl.int64)
    guess = first_guess(
        w_ptr, tl.program_id(0), rows, row_stride, RULE, COLUMNS, KEY_MASK, MANTISSA, TILE
    )
    for number in range(tl.program_id(0), rows, tl.num_programs(0)):
        row = tl.cast(number, tl.int64)
        row_ptr = w_ptr + row * row_stride
        given_row_ptr = given_ptr + row * MASK_BYTES
        k, cut, end, s1, s2, fault = decide_row(
            row_ptr,
            beta_ptr,
            limit_ptr + row,
            threshold,
            guess,
            RULE,
            WITH_WINDOW,
            COLUMNS,
            KEY_MASK,
            INFINITY,
            MANTISSA,
            SCALE,
            TILE,
        )
        guess = cut  # rows of one matrix have thresholds that are near each other
        if k == 0:  # nothing stays: a threshold that no weight reaches
            cut = tl.full([], KEY_MASK, tl.int32)
        written = tl.where(fault == 0, COLUMNS, 0)
        kept_N = tl.zeros([N], tl.int32)
        mass_N = tl.zeros([N], tl.float64)
        for start in range(0, COLUMNS, TILE):
            pattern_8N, key_8N, keep_8N = tile_keeps(
                row_ptr, given_row_ptr, start, cut, end, RULE, COLUMNS, KEY_MASK, TILE
            )
            kept_N += tl.sum(keep_8N, 0)
            mass_N += tl.sum(unscaled_magnitudes(tl.where(keep_8N != 0, key_8N, 0), MANTISSA), 0)
            if MASK:
                bits_N = tl.sum(keep_8N << tl.arange(0, 8)[:, None], 0)
                byte_N = start // 8 + tl.arange(0, N)
                at_N = out_ptr + row * out_stride + byte_N
                tl.store(at_N, bits_N.to(tl.uint8), mask=byte_N < MASK_BYTES)
            else:
                column_8N = columns_of_tile(start, TILE)
                pruned_8N = tl.where(keep_8N != 0, pattern_8N, 0)
                at_8N = out_ptr + row * out_stride + column_8N
                tl.store(at_8N, pruned_8N, mask=column_8N < written)
        tl.store(table_ptr + row * 3, tl.sum(kept_N, 0).to(tl.int64))
        tl.store(table_ptr + row * 3 + 1, zero)
        tl.store(table_ptr + row * 3 + 2, zero)
        tl.store(stats_ptr + row * 3, s1)
        tl.store(stats_ptr + row * 3 + 1, s2)
        tl.store(stats_ptr + row * 3 + 2, tl.sum(mass_N, 0) * power_of_two(SCALE))
        tl.store(fault_ptr + row, fault)
