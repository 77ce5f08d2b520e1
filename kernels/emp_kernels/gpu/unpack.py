"""Unpacks records on a GPU to rows of weights on it."""

import numpy as np
import numpy.typing as npt
import torch

from emp_kernels.cpu_backend import CpuBackend
from emp_kernels.errors import DamagedRowError
from emp_kernels.gpu.unpack_launch import launch_unpacking, lines_of
from emp_kernels.gpu_workspace import DeviceWorkspace
from emp_kernels.layout import RowLayout
from emp_kernels.rows import Bytes, Table, Workspace

__all__ = ["UnpackLaunch", "refuse", "unpack", "upload_records"]

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
        lines = lines_of(table, sections)
        self.faults = workspace.on_device("faults", rows)
        self._lines = workspace.upload("lines", lines).view(torch.int64)
        self._payload = payload
        self._layout = layout
        self._out = self._dense = out
        if out.stride(1) != 1:  # weight by weight, each would be written to a sector of its own
            nbytes = rows * columns * layout.number_format.item_bytes
            self._dense = workspace.on_device("dense", nbytes).view(out.dtype).view(rows, columns)
        self._tile = tile

    def __call__(self) -> None:
        """Put it on the stream."""
        launch_unpacking(
            self._payload,
            None,
            self._lines,
            self._layout,
            self._dense,
            faults=self.faults,
            tile=self._tile,
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
        refuse(record, sections[line], table[line], layout, row)


def refuse(
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
