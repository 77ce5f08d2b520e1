"""Unpacks records on a GPU to rows of weights on it."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from emp_kernels.cpu_backend import CpuBackend
from emp_kernels.errors import DamagedRowError
from emp_kernels.gpu.common import tile_of
from emp_kernels.gpu.unpack_bytes import unpack_bytes_row
from emp_kernels.gpu.unpack_kernel import unpack_row
from emp_kernels.gpu_workspace import DeviceWorkspace
from emp_kernels.layout import RowLayout
from emp_kernels.rows import Bytes, Table, Workspace

__all__ = ["UnpackLaunch", "unpack", "upload_records"]

_LARGEST_TILE = 256
"""Weights. One warp does such a tile: its scans need no barrier, and most tiles have no escape or
digits from one position only."""

_SLACK = 32
"""Bytes past the records that may be read with the last ones of them."""


def upload_records(payload: Bytes, workspace: DeviceWorkspace) -> torch.Tensor:
    """A block's records on the device, as `unpack` takes them.

    Args:
        payload: uint8 [bytes], C-contiguous; not to be changed before the stream is waited for.
        workspace: The records lie in its buffer; its stream must be the active one.
    """
    whole_words = workspace.on_device("records", -(-(payload.size + _SLACK) // 4) * 4)
    workspace.upload("records", payload)
    return whole_words


class UnpackLaunch:
    """The kernel that decodes packed rows; arguments as for `unpack`.

    Attributes:
        starts: int64 [4R + 1], where each record's sections begin, and the end of the last.
        faults: uint8 [R] on the device, once it has run: 0 where the record is sound.
    """

    def __init__(
        self,
        payload: torch.Tensor,
        sections: npt.NDArray[np.int64],
        table: Table,
        layout: RowLayout,
        out: torch.Tensor,
        workspace: DeviceWorkspace,
        *,
        tile: int | None = None,
    ) -> None:
        rows, columns = out.shape
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sections.ravel())])
        if payload.numel() < self.starts[-1] + _SLACK:
            needed = f"{self.starts[-1]} of records and {_SLACK} more"
            raise ValueError(f"the payload has {payload.numel()} bytes, it must have {needed}")
        lines = np.concatenate([table, self.starts[:-1].reshape(rows, 4)], axis=1)
        self.faults = workspace.on_device("faults", rows)
        self._lines = workspace.upload("lines", lines).view(torch.int64)
        self._payload = payload
        self._layout = layout
        self._out = self._dense = out
        if out.stride(1) != 1:  # weight by weight, each would be written to a sector of its own
            nbytes = rows * columns * layout.number_format.item_bytes
            self._dense = workspace.on_device("dense", nbytes).view(out.dtype).view(rows, columns)
        self._tile = tile or tile_of(columns, _LARGEST_TILE)

    def __call__(self) -> None:
        """Put it on the stream."""
        rows, columns = self._out.shape
        if not rows:
            return
        layout, dense = self._layout, self._dense
        power_of_two = layout.radix.bit_count() == 1
        in_bytes = layout.stored_bits == 7 and layout.number_format.bits == 16
        room = 16 if in_bytes else 24  # bits of the fractions in `place`
        common: dict[str, Any] = {
            "INFINITY": layout.number_format.infinity,
            "DROPPED": layout.dropped_bits,
            "RADIX": layout.radix,
            "DIGITS": layout.digits,
            "DIGIT_BITS": layout.radix.bit_length() - 1 if power_of_two else 0,
            "LOWEST": 0 if power_of_two else -(-(1 << room) // layout.radix),
            "ALIGN": layout.align,
            "TILE": self._tile,
            "num_warps": 1,
            "enable_fp_fusion": True,
        }
        records = self._payload, self._payload.view(torch.int32), self._lines
        if not in_bytes:
            unpack_row[(rows,)](
                *records,
                dense,
                self.faults,
                columns,
                dense.stride(0),
                BITS=layout.number_format.bits,
                STORED=layout.stored_bits,
                **common,
            )
        else:
            whole_words = not (columns % 2 or dense.stride(0) % 2 or dense.data_ptr() % 4)
            unpack_bytes_row[(rows,)](
                *records,
                dense,
                dense.view(torch.int32) if whole_words else dense,
                self.faults,
                columns,
                dense.stride(0),
                WHOLE_WORDS=whole_words,
                **common,
            )
        if self._dense is not self._out:
            self._out.copy_(self._dense)


def unpack(
    payload: torch.Tensor,
    sections: npt.NDArray[np.int64],
    table: Table,
    layout: RowLayout,
    out: torch.Tensor,
    workspace: DeviceWorkspace,
    *,
    tile: int | None = None,
) -> None:
    """Decode a block of packed rows on the device where they lie; returns when it is done.

    Args:
        payload: uint8, of `upload_records`: the block's records, one after the other, and at
            least 32 bytes that are not used.
        sections: int64 [R, 4], what `emp_kernels.checks.check_payload` returns for them.
        table: int64 [R, 3], their lines of the row table.
        layout: The tensor's layout.
        out: int16 or int32 [R, C], of any strides, written. What it holds is unspecified where a
            record is damaged.
        workspace: Of the device; its stream must be the active one.
        tile: Columns handled at a time, a power of two from 16; chosen if None.

    Raises:
        DamagedRowError: If a record contradicts its line of the table or itself.
        ValueError: If the payload is shorter than the sections and 32 bytes.
    """
    launch = UnpackLaunch(payload, sections, table, layout, out, workspace, tile=tile)
    launch()
    found = workspace.download("faults", launch.faults)
    workspace.wait()
    if found.any():
        row = int(np.argmax(found))
        start, stop = launch.starts[4 * row], launch.starts[4 * row + 4]
        record, line = payload[start:stop].cpu().numpy(), slice(row, row + 1)
        _refuse(record, sections[line], table[line], layout, row)


def _refuse(
    record: Bytes,
    sections: npt.NDArray[np.int64],
    table: Table,
    layout: RowLayout,
    row: int,
) -> None:
    """Say what is wrong with a row, as the CPU's kernel finds it.

    The kernel here only marks rows, to stay small: what is wrong is asked once, of one row.

    Raises:
        DamagedRowError: Always.
    """
    out = np.empty((1, layout.columns), layout.number_format.storage)
    try:
        CpuBackend(Workspace(), simd=False).unpack(record, sections, table, layout, out)
    except DamagedRowError as error:
        raise DamagedRowError(row, error.fault) from None
    raise AssertionError(f"row {row} is damaged on the device alone")
