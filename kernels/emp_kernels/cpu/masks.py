"""Masks apart from the weights: scores to masks, and rows packed by masks that are given.

Legend: s_RC are bit patterns of scores, w_RC of weights; mask_RB their masks, B = ⌈C/8⌉ bytes a
row, bit i of byte b for column 8b + i; table_R3 and stats_R3 as in `pack`.
"""

import numba
import numpy as np

from emp_kernels.cpu.pack import (
    DONE,
    DOUBTFUL,
    MAX_BINADES,
    NOT_FINITE,
    RECORDS,
    ROWS,
    SCRATCH_SLACK,
    count_from_sums,
    kept_sum,
    smallest_key,
    write_record,
)
from emp_kernels.cpu.select import (
    compress_row,
    count_reaching,
    kth_key,
    largest_key,
    row_sums,
    tie_columns,
)
from emp_kernels.cpu.simd import VECTOR_BYTES, compress_given_step, expand_step

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
def _write_given(kept_K, mask_B, dense_C, simd):
    """The kept weights in the places that a mask names, and zeros in the others."""
    k, start = 0, 0
    if simd:
        lanes = VECTOR_BYTES // dense_C.itemsize
        start = dense_C.size // lanes * lanes
        for c in range(0, start, lanes):
            k += expand_step(kept_K, k, mask_B, c >> 3, dense_C, c)
    for c in range(start, dense_C.size):
        keeps = np.int64(mask_B[c >> 3] >> np.uint8(c & 7)) & 1
        dense_C[c] = kept_K[k] if keeps else dense_C.dtype.type(0)
        k += keeps


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
    """Pack all rows of a block by their masks; arguments and result as `pack.pack_block`'s."""
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
        stats_R3[r, 0] = s1
        stats_R3[r, 1] = s2
        stats_R3[r, 2] = kept_sum(kept_K, k, key_mask, np.uint64(shift), scale)
        table_R3[r, 0] = k
        table_R3[r, 1] = 0
        table_R3[r, 2] = 0
        if emit == ROWS:
            _write_given(kept_K, mask_RB[r], dense_RC[r], simd)
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
        table_R3[r, 1] = escaped
        table_R3[r, 2] = base
    return DONE, rows, at


@_njit
def select_block(
    s_RC, number_format, rule, start, simd, kept_R, mask_RB, table_R3, stats_R3, kept_K
):
    """Decide which scores of a block stay.

    Args:
        s_RC: uint32 [R, C], contiguous.
        number_format: As in `pack.pack_block`.
        rule: (beta · slack, threshold, ties): with threshold < 0 each row is a group of its own,
            else scores above the threshold are kept, and the first `ties` equal to it.
        start: Row to begin with.
        simd: Whether to use vector compression.
        kept_R: int64 [R], how many of each row stay; −1 where that is the rule's to say.
        mask_RB: uint8 [R, B], written.
        table_R3: int64 [R, 3], written.
        stats_R3: float64 [R, 3], written.
        kept_K: scratch of s_RC's dtype, C + SCRATCH_SLACK.

    Returns:
        (status, row it refers to). After DOUBTFUL, call again from that row with its kept_R.
    """
    key_mask, infinity, _, shift, scale = number_format
    beta_slack, fixed_threshold, ties_left = rule
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
        if fixed_threshold < 0:
            k = kept_R[r]
            if k < 0:
                k = count_from_sums(s1, s2, columns, beta_slack)
                if k < 0:
                    return DOUBTFUL, r
            threshold, reach, exceed = np.int64(largest) + 1, np.int64(0), np.int64(0)
            if k > 0:
                threshold, reach, exceed = kth_key(s_C, key_mask, k, largest, guess)
                guess = threshold
            ties = k - exceed
        else:
            threshold = np.int64(fixed_threshold)
            reach = count_reaching(s_C, key_mask, threshold)
            exceed = count_reaching(s_C, key_mask, threshold + 1)
            ties = min(reach - exceed, ties_left)
            ties_left -= ties
            k = exceed + ties
        tie_end = columns
        if ties < reach - exceed:
            tie_end = tie_columns(s_C, key_mask, threshold, ties)
        compress_row(s_C, key_mask, threshold, tie_end, kept_K, mask, 0, simd)
        mask_RB[r] = mask[:mask_bytes]
        stats_R3[r, 0] = s1
        stats_R3[r, 1] = s2
        stats_R3[r, 2] = kept_sum(kept_K, k, key_mask, np.uint64(shift), scale)
        table_R3[r, 0] = k
        table_R3[r, 1] = 0
        table_R3[r, 2] = 0
    return DONE, rows
