"""Finds and decodes the record of a held row of bf16, and spreads its weights by its mask.

The kept weights come as planes, from `emp_kernels.cpu.byte_planes`. 64 columns at a time take as
many bytes of each plane as the mask names columns. Interleaved, low and high bytes are weights, in
an order of their own: *turned*. Of each 64 columns, those come first whose number has a remainder
below 8 when it is divided by 16.

Everything here needs AVX-512, see `emp_kernels.cpu.avx512`.
"""

import numba
import numpy as np

from emp_kernels.cpu import held_job as place
from emp_kernels.cpu.avx512 import expand
from emp_kernels.cpu.byte_planes import PLANE_SLACK, decode_planes
from emp_kernels.cpu.held_record import escape_place, find_parts, mask_word, whole_blocks
from emp_kernels.cpu.shuffles import interleave_high, interleave_low
from emp_kernels.cpu.vectors import (
    M64,
    U8x64,
    U16x32,
    cast,
    count_ones,
    load,
    mask_of,
    prefetch,
    store,
)

__all__ = [
    "decode_row",
    "plane_bytes",
    "planes_scratch",
    "spread",
    "spread_turned",
]

_njit = numba.njit(nogil=True, cache=True, error_model="numpy")


@_njit
def plane_bytes(columns):
    """Bytes of a plane of a row that keeps all its weights."""
    return whole_blocks(columns) + PLANE_SLACK


@_njit
def planes_scratch(columns):
    """Bytes of scratch that `decode_row` needs: two planes, and a mask."""
    return 2 * plane_bytes(columns) + whole_blocks(whole_blocks(columns) // 8)


@_njit
def decode_row(job, r, low):
    """Decode the kept weights of row r; returns the address of its mask.

    Args:
        job: See `emp_kernels.cpu.held_job`.
        r: The row.
        low: Address of scratch. The plane of low bytes comes first, that of high ones `plane_bytes`
            behind it. A mask is written behind these for a row that has none.
    """
    high = low + plane_bytes(job[place.COLUMNS])
    own_mask = high + plane_bytes(job[place.COLUMNS])
    (k, base, escaped), length, (mask, values, codes, escapes) = find_parts(job, r, 8, own_mask)
    decode_planes(
        values,
        codes,
        k,
        length,
        base,
        job[place.DIGITS],
        job[place.DIGIT_BITS],
        job[place.CODE_TABLES],
        low,
        high,
    )
    for e in range(escaped):
        j = escape_place(job, r, e)
        store(low + j, load(np.uint8, escapes + 2 * e))
        store(high + j, load(np.uint8, escapes + 2 * e + 1))
    return mask


@_njit
def spread(word, low, high):
    """The weights of 64 columns, turned, from planes at two addresses: two vectors of patterns."""
    named = mask_of(M64, word)
    low_bytes, high_bytes = expand(load(U8x64, low), named), expand(load(U8x64, high), named)
    return (
        cast(U16x32, interleave_low(low_bytes, high_bytes)),
        cast(U16x32, interleave_high(low_bytes, high_bytes)),
    )


@_njit
def spread_turned(mask, columns, low, high, target, ahead):
    """Write a row, turned, to an address: whole blocks of 64 columns, zeros past the last one."""
    for c in range(0, columns, 64):
        prefetch(ahead + c)
        word = mask_word(mask, c, columns)
        left, right = spread(word, low, high)
        store(target + 2 * c, left)
        store(target + 2 * c + 64, right)
        low += count_ones(word)
        high += count_ones(word)
