"""What the kernels share: keys, exact magnitudes, tiles."""

import triton
import triton.language as tl

from emp_kernels.numbers import NumberFormat

__all__ = [
    "COUNTS_IN_SHARED_MEMORY",
    "keys_at",
    "keys_of_tile",
    "magnitudes",
    "power_of_two",
    "scale_exponent",
    "tile_of",
    "unscaled_magnitudes",
]

_LARGEST_TILE = 4096

COUNTS_IN_SHARED_MEMORY = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)
"""Whether `tl.histogram` adds to shared memory. Before Triton 3.8 it compares each weight with each
bin, which is slower than to count by reading the row again."""


@triton.jit
def keys_of_tile(row_ptr, start, COLUMNS: tl.constexpr, KEY_MASK: tl.constexpr, TILE: tl.constexpr):
    """Load a tile of a row.

    Returns:
        (patterns as they are stored, keys as int32, which of the tile's columns the row has). Past
        the row's end patterns and keys are 0.
    """
    return keys_at(row_ptr, start + tl.arange(0, TILE), COLUMNS, KEY_MASK, COLUMNS % TILE == 0)


@triton.jit
def keys_at(row_ptr, column, COLUMNS: tl.constexpr, KEY_MASK: tl.constexpr, WHOLE: tl.constexpr):
    """As `keys_of_tile`, for columns in any order.

    With WHOLE the row has all of them, and loads need no mask: COLUMNS is known when the kernel is
    compiled, so most rows of real models get the kernel without.
    """
    inside = column < COLUMNS
    if WHOLE:
        pattern = tl.load(row_ptr + column)
    else:
        pattern = tl.load(row_ptr + column, mask=inside, other=0)
    return pattern, (pattern & KEY_MASK).to(tl.int32), inside


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
    """The exact magnitudes of keys, any int, divided by `power_of_two(SCALE)`, as float64.

    A key shifted so that its mantissa lies where float64's begins is the pattern of a float64: one
    shift a weight converts all three formats. Its exponent is read with float64's bias, hence the
    factor. Subnormals become subnormals of float64, of exactly the same factor.
    """
    return (keys.to(tl.int64) << (52 - MANTISSA)).to(tl.float64, bitcast=True)


@triton.jit
def power_of_two(exponent: tl.constexpr):
    """2**exponent as float64, made of its bits: Triton may keep a float literal in 32 bits."""
    return (tl.full([], exponent + 1023, tl.int64) << 52).to(tl.float64, bitcast=True)


def scale_exponent(number_format: NumberFormat) -> int:
    """The exponent of the factor of `magnitudes`: float64's exponent bias minus the format's."""
    exponent_bits = number_format.bits - 1 - number_format.mantissa_bits
    return 1023 - ((1 << exponent_bits - 1) - 1)


def tile_of(columns: int, largest: int = _LARGEST_TILE) -> int:
    """How many weights of a row are handled at a time: a power of two from 16.

    Args:
        columns: Of the row.
        largest: The largest tile, a power of two.
    """
    return min(max(1 << (columns - 1).bit_length(), 16), largest)
