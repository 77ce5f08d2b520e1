"""Packed weights that stay packed in a GPU's memory: they are multiplied from there.

As `emp_kernels.held` for the CPU. Calls put kernels on the current stream of the weights' device
and wait for nothing, so CUDA graphs can capture them.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from emp_kernels.checks import check_size
from emp_kernels.gpu.multiply import PART, multiply
from emp_kernels.gpu.unpack import refuse
from emp_kernels.gpu.unpack_launch import launch_checks, launch_unpacking, lines_of
from emp_kernels.gpu_arguments import (
    as_patterns,
    check_decoded,
    check_product,
    count_processors,
    current,
    in_whole_words,
)
from emp_kernels.layout import RowLayout
from emp_kernels.rows import Table

__all__ = [
    "DeviceHeldRows",
    "gather_rows_there",
    "hold_rows_there",
    "multiply_rows_there",
    "unpack_rows_there",
]

_PADDING = 16
"""Planes are padded to multiples of so many bytes."""


@dataclass(frozen=True, eq=False, kw_only=True)
class DeviceHeldRows:
    """Pruned rows, packed, in a GPU's memory: checked, ready to multiply.

    Attributes:
        records: uint8 [bytes], a multiple of four: the plane itself.
        lines: int64 [R, 7], what kernels are told of each row.
        starts: int32 [R, parts, 2], how many weights of a row are kept before each part of it, and
            how many of them escape.
        layout: The tensor's layout.
        processors: Multiprocessors of the device.
    """

    records: torch.Tensor
    lines: torch.Tensor
    starts: torch.Tensor
    layout: RowLayout
    processors: int

    @property
    def rows(self) -> int:
        """How many there are, R."""
        return len(self.lines)

    def part(self, first: int, stop: int) -> "DeviceHeldRows":
        """Rows first … stop − 1, in the same memory."""
        return replace(self, lines=self.lines[first:stop], starts=self.starts[first:stop])


def hold_rows_there(records: torch.Tensor, table: Table, layout: RowLayout) -> DeviceHeldRows:
    """Check pruned rows that lie in a GPU's memory, and make what products need; waits for it.

    Args:
        records: uint8 [bytes] on the device, the rows' records, one after the other, and at most 15
            bytes of padding. Kept as they are, unless they start within a word of four bytes or
            end in one: then they are copied.
        table: int64 [R, 3], their lines of the row table.
        layout: The tensor's layout.

    Raises:
        DamagedRowError: If a record contradicts its line of the table or itself.
    """
    said = int(layout.sections(table[:, 0], table[:, 1]).sum())
    padded = said <= records.numel() < said + _PADDING
    sections = check_size(said if padded else records.numel(), table, layout)
    records, device = in_whole_words(records), records.device
    lines = torch.from_numpy(lines_of(table, sections)).to(device)
    parts = -(-layout.columns // PART)
    starts = torch.zeros(len(table), parts, 2, dtype=torch.int32, device=device)
    faults = torch.zeros(len(table), dtype=torch.uint8, device=device)
    with current(device):
        launch_checks(records, records.numel() // 4, lines, layout, starts, faults, PART)
    found = faults.cpu().numpy()
    if found.any():
        row = int(np.argmax(found))
        start = int(sections[:row].sum())
        record = records[start : start + int(sections[row].sum())].cpu().numpy()
        line = slice(row, row + 1)
        refuse(record, sections[line], table[line], layout, row)
    return DeviceHeldRows(
        records=records,
        lines=lines,
        starts=starts,
        layout=layout,
        processors=count_processors(device),
    )


def multiply_rows_there(
    held: DeviceHeldRows, x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """Multiply inputs of a few tokens with all rows: out = x · Wᵀ + bias.

    Sums are float32, rounded once. The same GPU gives the same bits each time.

    Args:
        held: The rows, W [R, C].
        x: [T, C], contiguous, of the weights' dtype, 1 to `emp_kernels.gpu_arguments.MOST_TOKENS`
            tokens.
        out: [T, R], contiguous, of the same dtype, written.
        bias: [R], contiguous, of the same dtype.

    Raises:
        ValueError: If shapes or dtypes do not fit.
    """
    layout = held.layout
    check_product(layout.number_format, (held.rows, layout.columns), x, out, bias)
    with current(x.device):
        multiply(
            held.records,
            held.lines,
            held.starts,
            layout,
            as_patterns(x),
            as_patterns(out),
            None if bias is None else as_patterns(bias),
            processors=held.processors,
        )


def unpack_rows_there(held: DeviceHeldRows, out: torch.Tensor) -> None:
    """Decode all rows, without checks; for some of them see `DeviceHeldRows.part`.

    Args:
        held: The rows.
        out: [R, C] of the weights' dtype, written; the columns of a row lie side by side.
    """
    _decode(held, out, None)


def gather_rows_there(held: DeviceHeldRows, rows: torch.Tensor, out: torch.Tensor) -> None:
    """Decode the rows that are asked for, without checks.

    Args:
        held: The rows.
        rows: int64 [n], contiguous, on the device. Of a row that is not there, all weights are NaN.
        out: [n, C] of the weights' dtype, written; the columns of a row lie side by side.
    """
    _decode(held, out, rows)


def _decode(held: DeviceHeldRows, out: torch.Tensor, chosen: torch.Tensor | None) -> None:
    layout = held.layout
    count = held.rows if chosen is None else len(chosen)
    check_decoded(layout.number_format, (count, layout.columns), out)
    with current(out.device):
        launch_unpacking(
            held.records,
            held.records.numel() // 4,
            held.lines,
            layout,
            as_patterns(out),
            chosen=chosen,
        )
