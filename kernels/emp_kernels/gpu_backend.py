"""The backend of Triton's kernels: numpy arrays to a device, and what comes back."""

import numpy as np
import numpy.typing as npt
import torch

from emp_kernels.gpu import pack as packing
from emp_kernels.gpu import prune as pruning
from emp_kernels.gpu import unpack as unpacking
from emp_kernels.gpu_workspace import DeviceWorkspace
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import NumberFormat
from emp_kernels.rows import (
    Bytes,
    PackedRows,
    Patterns,
    PerRow,
    PrunedRows,
    Rule,
    SelectedRows,
    Table,
    Threshold,
)

__all__ = ["pack", "prune", "select", "unpack"]


def pack(
    weights: Patterns,
    layout: RowLayout,
    rule: Rule,
    *,
    emit: bool,
    workspace: DeviceWorkspace,
    tile: int | None = None,
) -> PackedRows:
    """See `emp_kernels.dispatch.pack_rows`."""
    with workspace.active():
        there = upload_patterns(weights, workspace)
        rows = packing.pack(there, layout, rule, workspace=workspace, emit=emit, tile=tile)
        payload = workspace.download("records", rows.payload)
        workspace.wait()
    return PackedRows(rows.table, rows.stats, payload)


def upload_patterns(weights: Patterns, workspace: DeviceWorkspace) -> torch.Tensor:
    """Patterns of rows on the device, int16 or int32 [R, C]."""
    integers = torch.int16 if weights.itemsize == 2 else torch.int32
    return workspace.upload("weights", weights).view(integers).view(weights.shape)


def prune(
    weights: Patterns,
    number_format: NumberFormat,
    rule: Rule,
    out: Patterns,
    *,
    workspace: DeviceWorkspace,
    tile: int | None = None,
) -> PrunedRows:
    """See `emp_kernels.dispatch.prune_rows`."""
    with workspace.active():
        there = upload_patterns(weights, workspace)
        figures = pruning.prune(
            there, number_format, rule, out=there, workspace=workspace, tile=tile
        )
        workspace.fetch(there, out)
        workspace.wait()
    return PrunedRows(figures.table, figures.stats, out)


def select(
    scores: Patterns,
    rule: PerRow | Threshold,
    kept: npt.NDArray[np.int64] | None,
    *,
    workspace: DeviceWorkspace,
    tile: int | None = None,
) -> SelectedRows:
    """See `emp_kernels.dispatch.select_rows`."""
    with workspace.active():
        there = upload_patterns(scores, workspace)
        figures, mask = pruning.select(there, rule, kept=kept, workspace=workspace, tile=tile)
        bits = workspace.download("mask", mask).reshape(mask.shape)
        workspace.wait()
    return SelectedRows(figures.table, figures.stats, bits.copy())


def unpack(
    payload: Bytes,
    table: Table,
    layout: RowLayout,
    out: Patterns,
    *,
    workspace: DeviceWorkspace,
    tile: int | None = None,
) -> None:
    """See `emp_kernels.dispatch.unpack_rows`."""
    with workspace.active():
        records = unpacking.upload_records(payload, workspace)
        integers = torch.int16 if out.itemsize == 2 else torch.int32
        there = workspace.on_device("weights", out.nbytes).view(integers).view(out.shape)
        unpacking.unpack(records, table, layout, there, workspace, tile=tile)
        workspace.fetch(there, out)
        workspace.wait()
