"""Bit patterns to float32, which is exact, and back, which rounds.

A number format is told by the width of a pattern in bits and the bits of its mantissa.
"""

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from emp_kernels.cpu.simd import bits_to_f32

__all__ = ["float_of", "floats_of", "pattern_of"]

_njit = numba.njit(nogil=True, cache=True)

_F32_INFINITY = np.uint32(0x7F800000)


@intrinsic
def _f32_to_bits(_context, number):
    """The bits of a float32, as uint32."""

    def codegen(_context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), codegen


@_njit
def floats_of(pattern_N, mantissa, float_N):
    """Write the numbers that patterns, uint16 or uint32, stand for to float_N, float32."""
    bits = 8 * pattern_N.itemsize
    for i in range(pattern_N.size):
        float_N[i] = float_of(np.uint32(pattern_N[i]), bits, mantissa)


@_njit
def float_of(pattern, bits, mantissa):
    """The number that a pattern, uint32, stands for, float32."""
    if bits == 32:
        return bits_to_f32(np.uint64(pattern))
    if mantissa == 7:
        return bits_to_f32(np.uint64(pattern << np.uint32(16)))
    return _float_of_half(pattern)


@_njit
def _float_of_half(pattern):
    """The number that an fp16 is: its bits as those of a float32 mean 2**-112 as much."""
    sign = (pattern & np.uint32(0x8000)) << np.uint32(16)
    key = pattern & np.uint32(0x7FFF)
    if key >= np.uint32(0x7C00):
        return bits_to_f32(np.uint64(sign | _F32_INFINITY | (key << np.uint32(13))))
    number = bits_to_f32(np.uint64(key << np.uint32(13))) * np.float32(2.0**112)
    return bits_to_f32(np.uint64(sign | _f32_to_bits(number)))


@_njit
def pattern_of(number, bits, mantissa):
    """A float32 rounded to the nearest number of a format, or the even one of two: its pattern."""
    whole = _f32_to_bits(number)
    if bits == 32:
        return whole
    if mantissa == 7:
        return _bfloat_of(whole)
    return _half_of(whole)


@_njit
def _bfloat_of(whole):
    """The bf16 of the bits of a float32."""
    if (whole & np.uint32(0x7FFFFFFF)) > _F32_INFINITY:
        return (whole >> np.uint32(16)) | np.uint32(0x40)
    return np.uint32(
        (whole + np.uint32(0x7FFF) + ((whole >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    )


@_njit
def _half_of(whole):
    """The fp16 of the bits of a float32."""
    sign = (whole >> np.uint32(16)) & np.uint32(0x8000)
    key = whole & np.uint32(0x7FFFFFFF)
    if key > _F32_INFINITY:
        return sign | np.uint32(0x7E00)
    if key >= np.uint32(0x47800000):  # 2**16, what rounds to it comes out below
        return sign | np.uint32(0x7C00)
    if key < np.uint32(0x38800000):
        # below 2**-14: the sum with 1/2 is rounded to multiples of 2**-24, as subnormals are
        rounded = _f32_to_bits(bits_to_f32(np.uint64(key)) + np.float32(0.5))
        return sign | np.uint32(rounded - np.uint32(0x3F000000))
    rounded = key + np.uint32(0xFFF) + ((key >> np.uint32(13)) & np.uint32(1))
    return sign | np.uint32((rounded - np.uint32(0x38000000)) >> np.uint32(13))
