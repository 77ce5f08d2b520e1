"""Finds the parts of the record of a held row, and its mask. Memory is given by address."""

import numba
import numpy as np

from emp_kernels.cpu import held_job as place
from emp_kernels.cpu.team import array_at
from emp_kernels.cpu.vectors import load

__all__ = ["ahead_of", "escape_place", "find_parts", "mask_word", "whole_blocks"]

_njit = numba.njit(nogil=True, cache=True, error_model="numpy")

_AHEAD = 12288
"""Bytes that are fetched ahead of the record at work: what is read jumps between the parts of a
record, and the CPU by itself does not find out that the next one follows."""


@_njit
def whole_blocks(columns):
    """Columns of so many blocks of 64 as hold all columns."""
    return (columns + 63) // 64 * 64


@_njit
def ahead_of(job, r):
    """The address from which on memory is to be fetched while row r is at work."""
    return _record_at(job, r) + _AHEAD


@_njit
def _record_at(job, r):
    """The address of the record of row r, or of its copy."""
    at = load(np.int64, job[place.OFFSETS] + 8 * r)
    if at < job[place.TAIL_START]:
        return job[place.PAYLOAD] + at
    return job[place.TAIL] + at - job[place.TAIL_START]


@_njit
def find_parts(job, r, width, own_mask):
    """What the table says of row r, and where the parts of its record are.

    Args:
        job: See `emp_kernels.cpu.held_job`.
        r: The row.
        width: Bits of a value.
        own_mask: Address of scratch, a bit for each of `whole_blocks` columns, to which a mask is
            written for a row that has none.

    Returns:
        (weights kept, base of the window, how many of them escape), (bytes of codes), (addresses of
        mask, values, codes, escapes).
    """
    columns, align, digits = job[place.COLUMNS], job[place.ALIGN], job[place.DIGITS]
    line = job[place.TABLE] + 12 * r
    k, escaped = np.int64(load(np.uint32, line)), np.int64(load(np.uint32, line + 4))
    base = np.int64(load(np.uint32, line + 8))
    values = mask = _record_at(job, r)
    if 0 < k < columns:
        values += (((columns + 7) >> 3) + align - 1) & -align
    else:
        mask = own_mask
        array_at(mask, whole_blocks(columns) // 8, np.uint8)[:] = 0xFF if k else 0
    codes = values + ((((k * width + 7) >> 3) + align - 1) & -align)
    length = np.int64(np.uint32(k + digits - 1) // np.uint32(digits)) if digits else 0
    escapes = codes + ((length + align - 1) & -align)
    return (k, base, escaped), length, (mask, values, codes, escapes)


@_njit
def escape_place(job, r, e):
    """Which of the kept weights of row r is its escape number e."""
    at = load(np.int64, job[place.ESCAPE_STARTS] + 8 * r) + e
    if job[place.PLACE_BYTES] == 2:
        return np.int64(load(np.uint16, job[place.ESCAPE_PLACES] + 2 * at))
    return np.int64(load(np.uint32, job[place.ESCAPE_PLACES] + 4 * at))


@_njit
def mask_word(mask, c, columns):
    """The mask's bits of 64 columns from c on, a multiple of 64: those past the last are zero."""
    word = load(np.uint64, mask + (c >> 3))
    if columns - c < 64:
        word &= (np.uint64(1) << np.uint64(columns - c)) - np.uint64(1)
    return word
