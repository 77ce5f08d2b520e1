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
from emp_kernels.cpu.shuffles import interleave_high, interleave_low
from emp_kernels.cpu.team import array_at
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
    "ahead_of",
    "decode_row",
    "mask_word",
    "plane_bytes",
    "planes_scratch",
    "spread",
    "spread_turned",
    "whole_blocks",
]

_njit = numba.njit(nogil=True, cache=True, error_model="numpy")


_AHEAD = 12288
"""Bytes that are fetched ahead of the record at work: what is read jumps between the parts of a
record, and the CPU by itself does not find out that the next one follows."""


@_njit
def whole_blocks(columns):
    """Columns of so many blocks of 64 as hold all columns."""
    return (columns + 63) // 64 * 64


@_njit
def plane_bytes(columns):
    """Bytes of a plane of a row that keeps all its weights."""
    return whole_blocks(columns) + PLANE_SLACK


@_njit
def planes_scratch(columns):
    """Bytes of scratch that `decode_row` needs: two planes, and a mask."""
    return 2 * plane_bytes(columns) + whole_blocks(whole_blocks(columns) // 8)


@_njit
def ahead_of(job, r):
    """The address from which on memory is to be fetched while row r is at work."""
    return record_at(job, r) + _AHEAD


@_njit
def record_at(job, r):
    """The address of the record of row r, or of its copy."""
    at = load(np.int64, job[place.OFFSETS] + 8 * r)
    if at < job[place.TAIL_START]:
        return job[place.PAYLOAD] + at
    return job[place.TAIL] + at - job[place.TAIL_START]


@_njit
def decode_row(job, r, low):
    """Decode the kept weights of row r; returns the address of its mask.

    Args:
        job: See `emp_kernels.cpu.held_job`.
        r: The row.
        low: Address of scratch. The plane of low bytes comes first, that of high ones `plane_bytes`
            behind it. A mask is written behind these for a row that has none.
    """
    columns, align, digits = job[place.COLUMNS], job[place.ALIGN], job[place.DIGITS]
    high = low + plane_bytes(columns)
    k = np.int64(load(np.uint32, job[place.TABLE] + 12 * r))
    escaped = np.int64(load(np.uint32, job[place.TABLE] + 12 * r + 4))
    base = np.int64(load(np.uint32, job[place.TABLE] + 12 * r + 8))
    record = mask = record_at(job, r)
    if 0 < k < columns:
        record += (((columns + 7) >> 3) + align - 1) & -align
    else:
        mask = high + plane_bytes(columns)
        _fill(mask, whole_blocks(columns) // 8, 0xFF if k else 0)
    codes = record + ((k + align - 1) & -align)
    length = np.int64(np.uint32(k + digits - 1) // np.uint32(digits)) if digits else 0
    decode_planes(
        record,
        codes,
        k,
        length,
        base,
        digits,
        job[place.DIGIT_BITS],
        job[place.CODE_TABLES],
        low,
        high,
    )
    if escaped:
        escapes = codes + ((length + align - 1) & -align)
        _put_escapes(job, r, escapes, escaped, low, high)
    return mask


@_njit
def _fill(address, size, byte):
    array_at(address, size, np.uint8)[:] = byte


@_njit
def _put_escapes(job, r, escapes, escaped, low, high):
    """Put the escaped weights of row r, at an address, in their places in the planes."""
    start = load(np.int64, job[place.ESCAPE_STARTS] + 8 * r)
    places = job[place.ESCAPE_PLACES] + job[place.PLACE_BYTES] * start
    low_K = array_at(low, job[place.COLUMNS], np.uint8)
    high_K = array_at(high, job[place.COLUMNS], np.uint8)
    for e in range(escaped):
        if job[place.PLACE_BYTES] == 2:
            j = np.int64(load(np.uint16, places + 2 * e))
        else:
            j = np.int64(load(np.uint32, places + 4 * e))
        low_K[j] = load(np.uint8, escapes + 2 * e)
        high_K[j] = load(np.uint8, escapes + 2 * e + 1)


@_njit
def mask_word(mask, c, columns):
    """The mask's bits of 64 columns from c on, a multiple of 64: those past the last are zero."""
    word = load(np.uint64, mask + (c >> 3))
    if columns - c < 64:
        word &= (np.uint64(1) << np.uint64(columns - c)) - np.uint64(1)
    return word


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
