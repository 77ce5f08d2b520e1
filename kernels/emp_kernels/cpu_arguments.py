"""What numba's kernels on rows take for formats, layouts and buffers; words for how they end."""

import numpy as np

from emp_kernels.cpu import status
from emp_kernels.cpu.pack import SCRATCH_SLACK
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import NumberFormat
from emp_kernels.rows import Bytes, Patterns, Workspace

__all__ = ["FAULTS", "format_arguments", "key_mask", "layout_arguments", "row_scratch"]

FAULTS = {
    status.BAD_MASK: "its mask names another number of weights than its table line",
    status.BAD_ESCAPES: "it marks another number of escapes than its table line",
    status.NOT_FINITE: "it holds NaN or infinity",
}
"""What is wrong with a row, by the status that a kernel ended with."""


def key_mask(number_format: NumberFormat) -> np.unsignedinteger:
    """All bits but the sign, as a pattern."""
    return number_format.storage.type(number_format.key_mask)


def format_arguments(
    number_format: NumberFormat,
) -> tuple[np.unsignedinteger, int, int, int, float]:
    """The argument `number_format` of `emp_kernels.cpu.pack.pack_block`."""
    return (
        key_mask(number_format),
        number_format.infinity,
        number_format.bits,
        number_format.to_f32_shift,
        number_format.to_f32_scale,
    )


def layout_arguments(layout: RowLayout) -> tuple[int, ...]:
    """The argument `layout` of the same."""
    return (
        layout.dropped_bits,
        layout.stored_bits,
        layout.radix,
        layout.digits,
        layout.limit,
        layout.align,
    )


def row_scratch(workspace: Workspace, layout: RowLayout) -> tuple[Patterns, Patterns, Bytes]:
    """Room for one row's kept weights, their distances from the window's base, their codes."""
    storage = layout.number_format.storage
    nbytes = (layout.columns + SCRATCH_SLACK) * storage.itemsize
    kept = workspace.take("kept", nbytes)[:nbytes].view(storage)
    delta = workspace.take("delta", nbytes)[:nbytes].view(storage)
    return kept, delta, workspace.take("codes", layout.columns)
