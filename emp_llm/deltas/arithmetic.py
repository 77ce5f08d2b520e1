"""Weights given as bit patterns, subtracted and added: in float32, rounded to their own format."""

import numpy as np
from emp_kernels.numbers import NumberFormat
from emp_kernels.rows import Patterns

from emp_llm.tensors.bit_patterns import as_float32, from_float32

__all__ = ["add", "subtract"]

_AT_ONCE = 1 << 16  # weights, whose float32 values stay in one core's cache


def subtract(
    weights: Patterns, number_format: NumberFormat, base: Patterns, base_format: NumberFormat
) -> None:
    """Subtract a base from weights, in their place.

    Args:
        weights: Bit patterns of any shape, C-contiguous; changed.
        number_format: Their format, which the differences are rounded to.
        base: As many bit patterns, C-contiguous.
        base_format: The format of these.
    """
    _combine(np.subtract, weights, number_format, base, base_format)


def add(
    weights: Patterns, number_format: NumberFormat, base: Patterns, base_format: NumberFormat
) -> None:
    """Add a base to differences, in their place; arguments are those of `subtract`."""
    _combine(np.add, weights, number_format, base, base_format)


def _combine(
    operation: np.ufunc,
    weights: Patterns,
    number_format: NumberFormat,
    base: Patterns,
    base_format: NumberFormat,
) -> None:
    flat, others = weights.reshape(-1), base.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):  # infinities show in the result
        for start in range(0, flat.size, _AT_ONCE):
            part = flat[start : start + _AT_ONCE]
            values = as_float32(part, number_format)
            operation(values, as_float32(others[start : start + _AT_ONCE], base_format), values)
            part[:] = from_float32(values, number_format)
