"""Weights given as bit patterns, compared, converted and printed."""

import numpy as np
import numpy.typing as npt
from emp_kernels.numbers import F16, F32, NumberFormat
from emp_kernels.rows import Patterns

__all__ = ["as_float32", "first_difference", "from_float32", "in_words"]

_INFINITY = 0xFF << 23  # of a float32


def first_difference(found: Patterns, expected: Patterns) -> tuple[int, int] | None:
    """Row and column of the first bit pattern that differs; None if none does.

    Args:
        found: [rows, columns].
        expected: [rows, columns].
    """
    unequal = found != expected
    if not unequal.any():
        return None
    row, column = divmod(int(unequal.argmax()), found.shape[1])
    return row, column


def as_float32(patterns: Patterns, number_format: NumberFormat) -> npt.NDArray[np.float32]:
    """The values of bit patterns, of any shape; every format's are exact in float32."""
    if number_format is F16:
        return patterns.view(np.float16).astype(np.float32)
    wide = patterns.astype(np.uint32) << np.uint32(number_format.to_f32_shift)
    return wide.view(np.float32)


def from_float32(
    values: npt.NDArray[np.float32], number_format: NumberFormat
) -> npt.NDArray[np.unsignedinteger]:
    """The bit patterns of values of any shape, rounded to nearest, ties to even.

    What is too large for the format becomes infinity, and NaN stays NaN.
    """
    if number_format is F16:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    whole = values.view(np.uint32)
    if number_format is F32:
        return whole
    rounded = whole + (np.uint32(0x7FFF) + (whole >> np.uint32(16) & np.uint32(1)))
    # rounding would carry some NaN over to zero
    nan = (whole & np.uint32(0x7FFFFFFF)) > np.uint32(_INFINITY)
    np.copyto(rounded, whole | np.uint32(0x400000), where=nan)
    return (rounded >> np.uint32(16)).astype(np.uint16)


def in_words(pattern: int, number_format: NumberFormat) -> str:
    """A weight's value and its bits.

    >>> from emp_kernels.numbers import BF16
    >>> in_words(0xBF00, BF16)
    '-0.5 (0xbf00)'
    """
    value = as_float32(np.array([pattern], number_format.storage), number_format)[0]
    return f"{value:.9g} (0x{pattern:0{number_format.item_bytes * 2}x})"
