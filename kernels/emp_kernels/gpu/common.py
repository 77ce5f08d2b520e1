"""What kernels have in common: keys, exact magnitudes, tiles."""

import triton
import triton.language as tl

from emp_kernels.numbers import NumberFormat

__all__ = [
    "COUNTS_IN_SHARED_MEMORY",
    "magnitudes",
    "power_of_two",
    "scale_exponent",
    "tile_of",
    "unscaled_magnitudes",
]

_LARGEST_TILE = 4096

COUNTS_IN_SHARED_MEMORY = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
"""Whether `tl.histogram` adds to shared memory; before, it compared each weight with each bin."""


@triton.jit
def magnitudes(keys, MANTISSA: tl.constexpr, SCALE: tl.constexpr):
    """The exact magnitudes of keys, any int, as float64.

    Args:
        keys: Finite keys.
        MANTISSA: Stored bits of their significand.
        SCALE: What `scale_exponent` gives for their format.
    """
    return unscaled_magnitudes(keys, MANTISSA) * power_of_two(SCALE)


@triton.jit
def unscaled_magnitudes(keys, MANTISSA: tl.constexpr):
    """The exact magnitudes of keys, any int, over `power_of_two(SCALE)`, as float64.

    These are a key's bits, moved to the top of a float64's fields: of subnormals and zero, too, for
    those of float64 are far below.
    """
    return (keys.to(tl.int64) << (52 - MANTISSA)).to(tl.float64, bitcast=True)


@triton.jit
def power_of_two(exponent: tl.constexpr):
    """A power of two as float64: one that Triton passes, or folds, may be of 32 bits."""
    return (tl.full([], exponent + 1023, tl.int64) << 52).to(tl.float64, bitcast=True)


def scale_exponent(number_format: NumberFormat) -> int:
    """The exponent of the power of two that `magnitudes` multiplies by: the biases' difference."""
    exponent_bits = number_format.bits - 1 - number_format.mantissa_bits
    return 1023 - ((1 << exponent_bits - 1) - 1)


def tile_of(columns: int, largest: int = _LARGEST_TILE) -> int:
    """How many weights of a row of so many are handled at a time: a power of two."""
    return min(max(1 << (columns - 1).bit_length(), 16), largest)
