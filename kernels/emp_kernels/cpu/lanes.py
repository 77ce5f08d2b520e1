"""Decodes the kept weights of rows of any format and layout, in lanes as wide as a weight.

The values of n weights are n·w/8 bytes, where w is the number of bits of one: whole bytes, for a
vector has 16 or 32 lanes. So in all vectors of one digit the same bytes of what is loaded belong to
a lane, and its value starts at the same bit of them. A table says which bytes and which bit, for
each of the eight bits of a byte at which the first value can start.

Everything here needs AVX-512, see `emp_kernels.cpu.avx512`. Memory is given by address. Vectors are
read and written whole: up to `LANE_SLACK` bytes past the end of values, codes and kept weights.
"""

from functools import cache

import numba
import numpy as np
import numpy.typing as npt

from emp_kernels.cpu.avx512 import look_up
from emp_kernels.cpu.vectors import U8x64, cast, load, load_bytes, shift_pair, splat, store

__all__ = ["LANE_SLACK", "decode_lanes", "value_tables"]

_njit = numba.njit(nogil=True, cache=True, error_model="numpy")

LANE_SLACK = 64

_TABLE = 192
"""Bytes of a table for one bit."""


@cache
def value_tables(width: int, bits: int) -> npt.NDArray[np.uint8]:
    """Where values of so many bits lie in what is loaded, for weights of 16 or 32: uint8 [8, 192].

    For each bit of a byte at which the first value can start, and for each lane: its low bytes, as
    many as a lane has, then its high bytes, as many again, then the bit of all these at which its
    value starts, an integer as wide as a lane.
    """
    tables = np.zeros((8, _TABLE), np.uint8)
    item = bits // 8
    for start in range(8):
        at = start + np.arange(64 // item) * width
        places = at[:, None] // 8 + np.arange(2 * item)
        tables[start, :64] = places[:, :item].reshape(-1)
        tables[start, 64:128] = places[:, item:].reshape(-1)
        tables[start, 128:] = (at % 8).astype(f"u{item}").view(np.uint8)
    return tables


@_njit
def decode_lanes(values, k, length, codes, digit_bits, numbers, tables, lanes, kept):
    """Decode k kept weights, but for escapes, in place of which anything is written.

    Args:
        values: Address of the values.
        k: How many weights there are.
        length: Weights of a digit: bytes of codes, or k if there are none.
        codes: Address of the codes as `look_up_codes` leaves them, two pieces of bytes.
        digit_bits: Bits of a digit there.
        numbers: (bits of a weight, mantissa bits stored, dropped, base of the window).
        tables: Address of `value_tables`.
        lanes: The kind of vector that holds weights, U16x32 or U32x16.
        kept: Address of the weights, written.
    """
    bits, stored, dropped, base = numbers
    item = bits >> 3
    step = 64 // item
    window = (
        splat(lanes, np.uint64((1 << stored) - 1)),
        splat(lanes, np.uint64((1 << digit_bits) - 1)),
        splat(lanes, np.uint64(stored)),
        splat(lanes, np.uint64(base)),
        splat(lanes, np.uint64(dropped)),
        splat(lanes, np.uint64(bits - 1 - stored)),
        splat(lanes, np.uint64(1 << (bits - 1))),
        splat(lanes, np.uint64((1 << (bits - 1)) - 1)),
    )
    shift, piece = 0, codes
    for first in range(0, k, max(length, 1)):
        at = first * (stored + 1)
        table = tables + _TABLE * (at & 7)
        places = load(U8x64, table), load(U8x64, table + 64), load(lanes, table + 128)
        digit_shift = splat(lanes, np.uint64(shift))
        value = values + (at >> 3)
        for i in range(0, min(length, k - first), step):
            number = _numbers(value, places, lanes)
            digit = load_bytes(lanes, piece + i) >> digit_shift
            store(kept + item * (first + i), _weights(number, digit, window))
            value += step * (stored + 1) >> 3
        shift += digit_bits
        if shift + digit_bits > 8:
            shift, piece = 0, codes + length + LANE_SLACK


@_njit
def _numbers(value, places, lanes):
    """What lies in memory from the first bit of each value at an address on, in lanes."""
    loaded = load(U8x64, value)
    low, high, starts = places
    return shift_pair(cast(lanes, look_up(loaded, high)), cast(lanes, look_up(loaded, low)), starts)


@_njit
def _weights(number, digit, window):
    """Weights from their values, below other bits, and their codes, below other bits."""
    low_mask, digit_mask, stored, base, dropped, sign_shift, sign, key_mask = window
    key = ((number & low_mask) + ((digit & digit_mask) << stored) + base) << dropped
    return ((number << sign_shift) & sign) | (key & key_mask)
