"""Rows of weights to the same rows with zeros, or to masks: one kernel for both."""

import triton
import triton.language as tl

from emp_kernels.gpu.common import magnitudes
from emp_kernels.gpu.decide import decide_row, tile_keeps

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
    COLUMNS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    INFINITY: tl.constexpr,
    MANTISSA: tl.constexpr,
    SCALE: tl.constexpr,
    MASK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Prune all rows but those with a fault; a program takes each `num_programs`-th one.

    With MASK bits are written in the place of weights.
    """
    BYTES_A_TILE: tl.constexpr = TILE // 8
    MASK_BYTES: tl.constexpr = (COLUMNS + 7) // 8
    guess = tl.full([], 0, tl.int32)
    zero = tl.full([], 0, tl.int64)
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
            COLUMNS,
            KEY_MASK,
            INFINITY,
            MANTISSA,
            SCALE,
            TILE,
        )
        guess = cut
        if k == 0:  # nothing stays: a threshold that no weight reaches
            cut = tl.full([], KEY_MASK, tl.int32)
        written = tl.where(fault == 0, COLUMNS, 0)
        kept_T = tl.zeros([TILE], tl.int32)
        mass_T = tl.zeros([TILE], tl.float64)
        for start in range(0, COLUMNS, TILE):
            pattern_T, key_T, keep_T = tile_keeps(
                row_ptr, given_row_ptr, start, cut, end, RULE, COLUMNS, KEY_MASK, TILE
            )
            kept_T += keep_T.to(tl.int32)
            mass_T += magnitudes(tl.where(keep_T, key_T, 0), MANTISSA, SCALE)
            if MASK:
                bit_T = keep_T.to(tl.int32) << (tl.arange(0, TILE) & 7)
                byte_B = start // 8 + tl.arange(0, BYTES_A_TILE)
                bits_B = tl.sum(tl.reshape(bit_T, (BYTES_A_TILE, 8)), 1)
                at_B = out_ptr + row * out_stride + byte_B
                tl.store(at_B, bits_B.to(tl.uint8), mask=byte_B < MASK_BYTES)
            else:
                column_T = start + tl.arange(0, TILE)
                pruned_T = tl.where(keep_T, pattern_T, 0)
                at_T = out_ptr + row * out_stride + column_T
                tl.store(at_T, pruned_T, mask=column_T < written)
        tl.store(table_ptr + row * 3, tl.sum(kept_T, 0).to(tl.int64))
        tl.store(table_ptr + row * 3 + 1, zero)
        tl.store(table_ptr + row * 3 + 2, zero)
        tl.store(stats_ptr + row * 3, s1)
        tl.store(stats_ptr + row * 3 + 1, s2)
        tl.store(stats_ptr + row * 3 + 2, tl.sum(mass_T, 0))
        tl.store(fault_ptr + row, fault)
