"""Masks from scores, and rows packed by masks that are given.

Legend: s_RC are bit patterns of scores, w_RC of weights; mask_RB their masks, B = ⌈C/8⌉ bytes a
row, bit i of byte b for column 8b + i; table_R3 and stats_R3 as in `emp_kernels.cpu.pack`.
"""

import numba
import numpy as np

from emp_kernels.cpu.decide import decide_row
from emp_kernels.cpu.pack import (
    MAX_BINADES,
    RECORDS,
    ROWS,
    SCRATCH_SLACK,
    kept_sum,
    put_three,
    smallest_key,
    write_record,
)
from emp_kernels.cpu.select import compress_row, largest_key, row_sums
from emp_kernels.cpu.simd import VECTOR_BYTES, compress_given_step
from emp_kernels.cpu.status import DONE, DOUBTFUL, NOT_FINITE
from emp_kernels.cpu.unpack import expand_row

__all__ = ["pack_given", "select_block"]

_njit = numba.njit(nogil=True, cache=True)


@_njit
def _compress_given(w_C, mask_B, kept_K, simd):
    """Write the weights that a mask names to kept_K; returns how many there are."""
    k, start = 0, 0
    if simd:
        lanes = VECTOR_BYTES // w_C.itemsize
        start = w_C.size // lanes * lanes
        for c in range(0, start, lanes):
            k += compress_given_step(w_C, c, mask_B, c >> 3, kept_K, k)
    for c in range(start, w_C.size):
        kept_K[k] = w_C[c]
        k += np.int64(mask_B[c >> 3] >> np.uint8(c & 7)) & 1
    return k


@_njit
def pack_given(
    w_RC,
    number_format,
    layout,
    mask_RB,
    simd,
    emit,
    out,
    dense_RC,
    table_R3,
    stats_R3,
    kept_K,
    delta_K,
    code_K,
):
    """Pack all rows of a row block by their masks, or prune them.

    Arguments and result are those of `emp_kernels.cpu.pack.pack_block`, but that mask_RB, uint8
    [R, B] with zero bits past the last column, stands in for the rule, and no row is DOUBTFUL.
    """
    key_mask, infinity, bits, shift, scale = number_format
    rows, columns = w_RC.shape
    counts = np.empty(MAX_BINADES, np.int64)
    at = np.int64(0)
    for r in range(rows):
        w_C = w_RC[r]
        if largest_key(w_C, key_mask) >= infinity:
            return NOT_FINITE, r, at
        s1, s2 = row_sums(w_C, key_mask, np.uint64(shift), scale)
        k = _compress_given(w_C, mask_RB[r], kept_K, simd)
        mass = kept_sum(kept_K, k, key_mask, np.uint64(shift), scale)
        put_three(stats_R3, r, s1, s2, mass)
        put_three(table_R3, r, k, 0, 0)
        if emit == ROWS:
            expand_row(kept_K, mask_RB[r], 0, dense_RC[r], simd)
            continue
        if k == 0:
            continue
        if emit == RECORDS and k < columns:
            out[at : at + mask_RB.shape[1]] = mask_RB[r]
        smallest = smallest_key(kept_K[:k], key_mask)
        escaped, base, at = write_record(
            kept_K,
            k,
            columns,
            smallest,
            key_mask,
            bits,
            layout,
            emit,
            out,
            at,
            counts,
            delta_K,
            code_K,
        )
        put_three(table_R3, r, k, escaped, base)
    return DONE, rows, at


@_njit
def select_block(
    s_RC, number_format, rule, start, simd, kept_R, mask_RB, table_R3, stats_R3, kept_K
):
    """Decide which scores of a row block stay.

    Args:
        s_RC: uint32 [R, C], contiguous.
        number_format: As for `emp_kernels.cpu.pack.pack_block`.
        rule: As for `emp_kernels.cpu.decide.decide_row`.
        start: Row to begin with.
        simd: Whether to use vector compression.
        kept_R: int64 [R], how many of each row stay; −1 where the rule says.
        mask_RB: uint8 [R, B], written.
        table_R3: int64 [R, 3], written.
        stats_R3: float64 [R, 3], written.
        kept_K: scratch of s_RC's dtype, C + SCRATCH_SLACK.

    Returns:
        (status, row it refers to): DONE, NOT_FINITE or DOUBTFUL. After DOUBTFUL, set kept_R of
        that row to the exact count, and call again and start there.
    """
    key_mask, infinity, _, shift, scale = number_format
    ties_left = rule[2]
    rows, columns = s_RC.shape
    mask_bytes = (columns + 7) // 8
    mask = np.empty(mask_bytes + SCRATCH_SLACK, np.uint8)
    guess = np.int64(0)
    for r in range(start, rows):
        s_C = s_RC[r]
        largest = largest_key(s_C, key_mask)
        if largest >= infinity:
            return NOT_FINITE, r
        s1, s2 = row_sums(s_C, key_mask, np.uint64(shift), scale)
        k, threshold, tie_end, ties = decide_row(
            s_C, key_mask, largest, s1, s2, rule, kept_R[r], ties_left, guess
        )
        if k < 0:
            return DOUBTFUL, r
        ties_left -= ties
        if k > 0:
            guess = threshold
        compress_row(s_C, key_mask, threshold, tie_end, kept_K, mask, 0, simd)
        mask_RB[r] = mask[:mask_bytes]
        mass = kept_sum(kept_K, k, key_mask, np.uint64(shift), scale)
        put_three(stats_R3, r, s1, s2, mass)
        put_three(table_R3, r, k, 0, 0)
    return DONE, rows
