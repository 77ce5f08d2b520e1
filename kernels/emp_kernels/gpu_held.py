"""Packed weights that stay packed in a GPU's memory: they are multiplied from there.

As `emp_kernels.held` for the CPU. Calls put kernels on the current stream of the weights' device
and wait for nothing, so CUDA graphs can capture them.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch

from emp_kernels.checks import check_size
from emp_kernels.gpu.multiply import multiply
from emp_kernels.gpu.unpack import refuse
from emp_kernels.gpu.unpack_launch import launch_checks, launch_unpacking, lines_of
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import torch_integers
from emp_kernels.rows import Table

__all__ = [
    "MOST_TOKENS",
    "DeviceHeldRows",
    "gather_rows_there",
    "hold_rows_there",
    "multiply_rows_there",
    "unpack_rows_there",
]

MOST_TOKENS = 16
"""Tokens that `multiply_rows_there` takes. For more, unpack to a buffer and have torch multiply."""

_PART = 1024
"""Columns of the parts of a row that programs may share; a multiple of every tile."""

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
    records, device = _in_whole_words(records), records.device
    lines = torch.from_numpy(lines_of(table, sections)).to(device)
    parts = -(-layout.columns // _PART)
    starts = torch.zeros(len(table), parts, 2, dtype=torch.int32, device=device)
    faults = torch.zeros(len(table), dtype=torch.uint8, device=device)
    with _current(device):
        launch_checks(records, records.numel() // 4, lines, layout, starts, faults, _PART)
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
        processors=_processors(device),
    )


def multiply_rows_there(
    held: DeviceHeldRows, x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """Multiply inputs of a few tokens with all rows: out = x · Wᵀ + bias.

    Sums are float32, rounded once. The same GPU gives the same bits each time.

    Args:
        held: The rows, W [R, C].
        x: [T, C], contiguous, 1 to `MOST_TOKENS` tokens, of the weights' dtype.
        out: [T, R], contiguous, of the same dtype, written.
        bias: [R], contiguous, of the same dtype.

    Raises:
        ValueError: If shapes or dtypes do not fit.
    """
    dtype, columns = held.layout.number_format.torch_dtype, held.layout.columns
    tokens = len(x)
    shapes = [(x, (tokens, columns)), (out, (tokens, held.rows))]
    for tensor, shape in [*shapes, *([(bias, (held.rows,))] if bias is not None else [])]:
        if tensor.shape != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{tensor.dtype} {tuple(tensor.shape)} cannot be multiplied with or added to "
                f"{held.rows} rows of {columns}; it must be {dtype} {shape}, contiguous"
            )
    if not 1 <= tokens <= MOST_TOKENS:
        raise ValueError(f"{tokens} tokens; they must be 1 to {MOST_TOKENS}")
    with _current(x.device):
        multiply(
            held.records,
            held.lines,
            held.starts,
            held.layout,
            _patterns(x),
            _patterns(out),
            None if bias is None else _patterns(bias),
            part=_PART,
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
    expected = (held.rows if chosen is None else len(chosen), held.layout.columns)
    dtype = held.layout.number_format.torch_dtype
    if out.shape != expected or out.dtype != dtype or out.stride(1) != 1:
        raise ValueError(
            f"rows are to be decoded to {out.dtype} {tuple(out.shape)}; that must be {dtype} "
            f"{expected}, the columns of a row side by side"
        )
    with _current(out.device):
        launch_unpacking(
            held.records,
            held.records.numel() // 4,
            held.lines,
            held.layout,
            _patterns(out),
            chosen=chosen,
        )


def _in_whole_words(records: torch.Tensor) -> torch.Tensor:
    """Records that start and end with a word of four bytes: themselves, or else a copy."""
    if records.is_contiguous() and not (records.numel() % 4 or records.data_ptr() % 4):
        return records
    copy = records.new_zeros(-(-records.numel() // 4) * 4)
    copy[: records.numel()] = records
    return copy


def _patterns(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch_integers(tensor.itemsize))


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a GPU the one that kernels go to."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1  # Triton's interpreter stands in for a GPU
    return torch.cuda.get_device_properties(device).multi_processor_count
