"""Blocks of rows on a GPU, and there they stay: `emp_kernels.dispatch` for tensors of torch."""

import torch

from emp_kernels.checks import check_mask, check_payload
from emp_kernels.gpu import prune as pruning
from emp_kernels.gpu import unpack as unpacking
from emp_kernels.gpu_workspace import DeviceWorkspace
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import NumberFormat
from emp_kernels.rows import Bytes, RowFigures, Rule, Table

__all__ = ["prune_there", "unpack_there"]


def prune_there(
    weights: torch.Tensor,
    number_format: NumberFormat,
    rule: Rule,
    *,
    workspace: DeviceWorkspace,
) -> RowFigures:
    """Decide which weights of a block of rows stay, and put +0.0 in the place of the others.

    Args:
        weights: int16 or int32 [R, C] on the workspace's device, bit patterns, of any strides, and
            written by its stream.
        number_format: Their format.
        rule: What to keep.
        workspace: Buffers to use again.

    Raises:
        NonFiniteRowError: If a weight is NaN or infinite.
        ValueError: If a given mask is not one of these weights.
    """
    check_mask(weights.shape, rule)
    with workspace.active():
        figures = pruning.prune(weights, number_format, rule, out=weights, workspace=workspace)
        workspace.wait()
    return figures


def unpack_there(
    payload: Bytes,
    table: Table,
    layout: RowLayout,
    out: torch.Tensor,
    *,
    workspace: DeviceWorkspace,
) -> None:
    """Decode a block of packed rows.

    Args:
        payload: uint8 [bytes] on the host, the block's records, one after the other, and nothing
            else; they go to the device as they are.
        table: int64 [R, 3], their lines of the row table.
        layout: The tensor's layout.
        out: int16 or int32 [R, C] on the workspace's device, of any strides, to write to.
        workspace: Buffers to use again.

    Raises:
        DamagedRowError: If a record contradicts its line of the table or itself.
    """
    check_payload(payload, table, layout)
    with workspace.active():
        records = unpacking.upload_records(payload, workspace)
        unpacking.unpack(records, table, layout, out, workspace)
