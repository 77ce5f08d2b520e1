"""Decodes kept weights of bf16 rows that have all mantissa bits stored: 64 at a time, as bytes.

The value of such a weight is a byte: its sign, and the low 7 bits of its distance from the base of
the window. The code is the bits above these. Base plus distance is computed in bytes too: the lower
ones first, then the higher ones with what was carried. So the weights come out as two *planes*: the
low bytes of all of them, and the high bytes of all.

Everything here needs AVX-512, see `emp_kernels.cpu.avx512`. Memory is given by address. Vectors are
read and written whole: up to `PLANE_SLACK` bytes past the end of values, codes and planes.
"""

from functools import cache

import numba
import numpy as np
import numpy.typing as npt

from emp_kernels.cpu.avx512 import look_up_in_rows, look_up_in_two
from emp_kernels.cpu.vectors import U8x64, U16x32, cast, load, pick, splat, store
from emp_kernels.layout import DIGITS

__all__ = ["PLANE_SLACK", "code_tables", "decode_planes", "digit_bits", "look_up_codes"]

_njit = numba.njit(nogil=True, cache=True, error_model="numpy")

PLANE_SLACK = 64


def digit_bits(radix: int) -> int:
    """Bits that a digit of a code takes in the tables: 1 to 4, and 0 for radix 1."""
    return (radix - 1).bit_length()


@cache
def code_tables(radix: int) -> npt.NDArray[np.uint8]:
    """By what bytes of codes are replaced: uint8 [576].

    The digits of a byte, in `digit_bits` each, side by side: as many as fit a byte, from
    table[byte], and the others, from table[256 + byte]. Behind them are the halves of 0 to 15, four
    times: what a code adds to the high byte of a weight.
    """
    digits, bits = DIGITS[radix], max(digit_bits(radix), 1)
    tables = np.zeros(576, np.uint8)
    for byte in range(256):
        for t in range(digits):
            digit = byte // radix**t % radix
            tables[t // (8 // bits) * 256 + byte] |= digit << t % (8 // bits) * bits
    tables[512:] = np.arange(64) % 16 // 2
    return tables


@_njit
def decode_planes(values, codes, k, length, base, digits, digit_bits, tables, low, high):
    """Decode k kept weights, but for escapes, in place of which anything is written.

    Args:
        values: Address of the values.
        codes: Address of the codes.
        k: How many weights there are.
        length: Bytes of codes.
        base: Base of the window.
        digits: Digits in a byte of codes, 0 if there are none.
        digit_bits: Bits of a digit in the tables.
        tables: Address of `code_tables`.
        low: Address of the plane of low bytes, written.
        high: Address of the plane of high bytes, written.
    """
    base_low = splat(U8x64, np.uint64(base))
    high_of_code = load(U8x64, tables + 512) + splat(U8x64, np.uint64(base >> 8))
    digit_mask = splat(U8x64, np.uint64((1 << digit_bits) - 1))
    window = digit_mask, base_low, high_of_code
    if digits == 0:
        for i in range(0, k, 64):
            _decode_digit(splat(U8x64, np.uint64(0)), 0, window, values + i, low + i, high + i)
        return
    first = min(np.uint32(8) // np.uint32(digit_bits), np.uint32(digits))
    last = (length - 1) // 64 * 64
    for n in range(0, length, 64):
        # The last vectors come first: what they write past a digit's weights is where the next
        # digit's weights belong, and these are written later.
        i = n - 64 if n else last
        code = load(U8x64, codes + i)
        packed = _in_256(tables, code)
        shift = 0
        for _ in range(first):
            _decode_digit(packed, shift, window, values + i, low + i, high + i)
            i += length
            shift += digit_bits
        if first == digits:
            continue
        packed = _in_256(tables + 256, code)
        shift = 0
        for _ in range(first, digits):
            _decode_digit(packed, shift, window, values + i, low + i, high + i)
            i += length
            shift += digit_bits


@_njit
def look_up_codes(codes, length, tables, target):
    """Write the digits of bytes of codes, as in `code_tables`.

    Args:
        codes: Address of the codes.
        length: How many there are.
        tables: Address of `code_tables`.
        target: Address of two pieces of `length` bytes and the slack, written: the first digits of
            all, and the others.
    """
    for i in range(0, length, 64):
        code = load(U8x64, codes + i)
        store(target + i, _in_256(tables, code))
    for i in range(0, length, 64):
        code = load(U8x64, codes + i)
        store(target + length + PLANE_SLACK + i, _in_256(tables + 256, code))


@_njit
def _in_256(table, index):
    """table[i] of 256 bytes for each byte i of a vector."""
    low = look_up_in_two(load(U8x64, table), index, load(U8x64, table + 64))
    high = look_up_in_two(load(U8x64, table + 128), index, load(U8x64, table + 192))
    return pick(index < splat(U8x64, np.uint64(128)), low, high)


@_njit
def _decode_digit(packed, shift, window, values, low, high):
    """Decode 64 weights, the codes of which are in each byte of `packed` from bit `shift` on."""
    digit_mask, base_low, high_of_code = window
    value = load(U8x64, values)
    top, rest = splat(U8x64, np.uint64(0x80)), splat(U8x64, np.uint64(0x7F))
    words = cast(U16x32, packed)
    # the lowest bit of the code belongs to the low byte, as its highest bit
    is_odd = cast(U8x64, words << splat(U16x32, np.uint64(7 - shift)))
    low_byte = ((value & rest) | (is_odd & top)) + base_low
    code = cast(U8x64, words >> splat(U16x32, np.uint64(shift))) & digit_mask
    one, zero = splat(U8x64, np.uint64(1)), splat(U8x64, np.uint64(0))
    carried = pick(low_byte < base_low, one, zero)
    high_byte = look_up_in_rows(high_of_code, code) + carried
    store(low, low_byte)
    store(high, (high_byte & rest) | (value & top))
