"""Packs rows of weights that are on a GPU, to records on it."""

from dataclasses import dataclass

import torch
import triton

from emp_kernels.gpu.launching import RowsOnDevice, RuleTensors, Shape, rows_of
from emp_kernels.gpu.pack_kernel import pack_kernel
from emp_kernels.gpu_workspace import DeviceWorkspace
from emp_kernels.layout import RowLayout
from emp_kernels.rows import RowStatistics, Rule

__all__ = ["DeviceRows", "PackLaunch", "pack"]


@dataclass(frozen=True)
class DeviceRows(RowStatistics):
    """A packed row block; table and stats are on the host.

    Attributes:
        payload: uint8 [bytes] on the device, the records; a view of the workspace. Empty where
            nothing was emitted.
    """

    payload: torch.Tensor


class PackLaunch:
    """The kernel that packs rows, and the memory that it needs.

    Args:
        weights: int16 or int32 [R, C], patterns; weights of a row side by side.
        layout: The rows' layout.
        workspace: Of the device.
        emit: Whether to write records.
        tile: Weights of a row that are handled at a time; a power of two.

    Attributes:
        rows: The rows, and what was decided once it has run.
        out: uint8, room for the records.
    """

    def __init__(
        self,
        weights: torch.Tensor,
        layout: RowLayout,
        workspace: DeviceWorkspace,
        *,
        emit: bool = True,
        tile: int | None = None,
    ) -> None:
        self.rows = RowsOnDevice(weights, layout.number_format, workspace)
        rows, columns = weights.shape
        self._layout = layout
        self._emit = emit
        shape = self._shape = Shape.of(weights, tile)
        room = rows * layout.longest_record if emit else 0
        self.out = workspace.on_device("records", room)
        # the number of the next row to be given out, then each row's state: zeroed in one go
        self._states = workspace.on_device("states", rows * 8 + 8).view(torch.int64)
        width = layout.stored_bits + 1
        item = layout.number_format.item_bytes
        # items that the longest section of values, padded and rounded up to a unit, may need past
        # the kept weights: zeros
        self._zeros = triton.next_power_of_2((8 * layout.align + 72) // width + 16)
        self._escapes_at = -(-(columns + self._zeros) // 16) * 16
        self._scratch_stride = self._escapes_at + -(-columns // 16) * 16 * 4 // item
        # one tile more at the end: the last one of codes is read whole
        scratch_items = shape.programs * self._scratch_stride + shape.tile
        scratch = workspace.on_device("scratch", scratch_items * item)
        self._scratch = scratch.view(weights.dtype)
        self._mask_stride = -(-columns // 1024) * 128
        self._masks = workspace.on_device("masks", shape.programs * self._mask_stride)
        self._binades = workspace.on_device("binades", shape.programs * 1024).view(torch.int32)

    def __call__(self, rule: RuleTensors) -> None:
        """Put it on the stream."""
        rows, layout = self.rows, self._layout
        number_format = layout.number_format
        self._states.zero_()
        pack_kernel[(self._shape.programs,)](
            rows.weights,
            rule.given,
            rule.beta,
            rule.limits,
            self.out,
            rows.table,
            rows.stats,
            rows.faults,
            self._states[1:],
            self._states,
            self._scratch,
            self._masks,
            self._binades,
            len(rows.weights),
            rule.threshold,
            rows.weights.stride(0),
            self._escapes_at,
            self._scratch_stride,
            self._mask_stride,
            SIGN=number_format.bits - 1,
            ITEM=number_format.item_bytes,
            DROPPED=layout.dropped_bits,
            STORED=layout.stored_bits,
            RADIX=layout.radix,
            DIGITS=layout.digits,
            LIMIT=layout.limit,
            ALIGN=layout.align,
            ZEROS=self._zeros,
            EMIT=self._emit,
            LOOK_BACK=max(32 * self._shape.warps, 64),  # a row for each thread
            **rows.constants(rule, self._shape),
        )


def pack(
    weights: torch.Tensor,
    layout: RowLayout,
    rule: Rule,
    *,
    workspace: DeviceWorkspace,
    emit: bool = True,
    tile: int | None = None,
) -> DeviceRows:
    """Decide which weights of rows stay, and pack them; as `emp_kernels.dispatch.pack_rows`.

    Args:
        weights: int16 or int32 [R, C] on the workspace's device, patterns, of any strides.
        layout: The rows' layout.
        rule: What to keep.
        workspace: Buffers to use again; the payload lies in them.
        emit: Whether to write records.
        tile: Weights of a row that are handled at a time; a power of two.

    Raises:
        NonFiniteRowError: If a weight is NaN or infinite.
    """
    launch = PackLaunch(rows_of(weights), layout, workspace, emit=emit, tile=tile)
    decided = launch.rows.run(rule, launch)
    used = int(layout.offsets(decided.table[:, 0], decided.table[:, 1])[-1]) if emit else 0
    return DeviceRows(decided.table, decided.stats, launch.out[:used])
