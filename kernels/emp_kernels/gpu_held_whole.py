"""Whole records that stay packed in a GPU's memory: they are multiplied from there.

As `emp_kernels.gpu_held` for pruned rows.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from emp_kernels.checks import check_record_sizes
from emp_kernels.cpu_backend import CpuBackend
from emp_kernels.errors import DamagedRowError
from emp_kernels.gpu.whole import WholeThere, check_records
from emp_kernels.gpu_arguments import (
    as_patterns,
    check_decoded,
    check_product,
    count_processors,
    current,
    in_whole_words,
)
from emp_kernels.rows import Bytes, Counts, Workspace
from emp_kernels.whole_layout import WholeLayout

__all__ = [
    "DeviceHeldWhole",
    "gather_whole_there",
    "hold_whole_there",
    "multiply_whole_there",
    "unpack_whole_there",
]

_PADDING = 16
"""Planes are padded to multiples of so many bytes."""


@dataclass(frozen=True, eq=False, kw_only=True)
class DeviceHeldWhole:
    """Rows of whole records in a GPU's memory: checked, ready to multiply.

    Attributes:
        there: All rows of the tensor, and what kernels are told of them.
        first: The first of these rows.
        rows: How many they are.
        processors: Multiprocessors of the device.
    """

    there: WholeThere
    first: int
    rows: int
    processors: int

    @property
    def layout(self) -> WholeLayout:
        """The tensor's layout."""
        return self.there.layout

    @property
    def records(self) -> torch.Tensor:
        """uint8 [bytes], a multiple of four: the plane itself."""
        return self.there.records

    @property
    def shape(self) -> tuple[int, int]:
        """[R, C] of these rows."""
        return self.rows, self.there.columns

    def part(self, first: int, stop: int) -> "DeviceHeldWhole":
        """Rows first … stop − 1, in the same memory."""
        return replace(self, first=self.first + first, rows=stop - first)


def hold_whole_there(
    records: torch.Tensor, lengths: Counts, layout: WholeLayout, rows: int, columns: int
) -> DeviceHeldWhole:
    """Check whole records that lie in a GPU's memory, and make what products need; waits for it.

    Args:
        records: uint8 [bytes] on the device, the records, one after the other, and at most 15 bytes
            of padding. Kept as they are, unless they start within a word of four bytes or end in
            one: then they are copied.
        lengths: int64 [records], bytes of each.
        layout: The tensor's layout.
        rows: Of the tensor.
        columns: Of a row; records hold whole rows.

    Raises:
        DamagedRowError: If a record contradicts its length or itself; its row is the record.
        ValueError: If so many records do not hold so many rows.
    """
    if layout.weights % columns or len(lengths) != layout.records(rows * columns):
        raise ValueError(
            f"{len(lengths)} records of {layout.weights} weights do not hold {rows} rows of "
            f"{columns}"
        )
    said = int(lengths.sum())
    padded = said <= records.numel() < said + _PADDING
    check_record_sizes(said if padded else records.numel(), lengths, layout)
    records = in_whole_words(records)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    with current(records.device):
        starts = torch.from_numpy(offsets).to(records.device)
        sections, faults = check_records(records, starts, layout, [rows, columns])
        found = faults.cpu().numpy()
        if found.any():
            number = int(np.argmax(found))
            record = records[offsets[number] : offsets[number + 1]].cpu().numpy()
            weights = min(layout.weights, rows * columns - number * layout.weights)
            _refuse(record, layout, weights, number)
        there = WholeThere.of(records, sections, layout, [rows, columns])
    processors = count_processors(records.device)
    return DeviceHeldWhole(there=there, first=0, rows=rows, processors=processors)


def _refuse(record: Bytes, layout: WholeLayout, weights: int, number: int) -> None:
    """Say what is wrong with a record, as the CPU's kernel finds it.

    Raises:
        DamagedRowError: Always.
    """
    out = np.empty(weights, layout.number_format.storage)
    try:
        lengths = np.array([record.size])
        CpuBackend(Workspace(), simd=False).unpack_whole(record, lengths, layout, out)
    except DamagedRowError as error:
        raise DamagedRowError(number, error.fault) from None
    raise AssertionError(f"record {number} is damaged on the device alone")


def multiply_whole_there(
    held: DeviceHeldWhole, x: torch.Tensor, out: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """As `emp_kernels.gpu_held.multiply_rows_there`."""
    check_product(held.layout.number_format, held.shape, x, out, bias)
    with current(x.device):
        held.there.multiply(
            as_patterns(x),
            as_patterns(out),
            None if bias is None else as_patterns(bias),
            held.first,
            held.processors,
        )


def unpack_whole_there(held: DeviceHeldWhole, out: torch.Tensor) -> None:
    """As `emp_kernels.gpu_held.unpack_rows_there`."""
    check_decoded(held.layout.number_format, held.shape, out)
    with current(out.device):
        held.there.unpack(as_patterns(out), held.first, held.rows, None)


def gather_whole_there(held: DeviceHeldWhole, rows: torch.Tensor, out: torch.Tensor) -> None:
    """As `emp_kernels.gpu_held.gather_rows_there`."""
    check_decoded(held.layout.number_format, (len(rows), held.shape[1]), out)
    with current(out.device):
        held.there.unpack(as_patterns(out), held.first, held.rows, rows)
