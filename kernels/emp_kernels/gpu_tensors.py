"""Row blocks that are on a GPU and stay there: `emp_kernels.dispatch` for tensors of torch."""

import torch

from emp_kernels.checks import check_mask, check_payload
from emp_kernels.gpu import prune as pruning
from emp_kernels.gpu import unpack as unpacking
from emp_kernels.gpu_workspace import DeviceWorkspace
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import NumberFormat
from emp_kernels.rows import Bytes, RowStatistics, Rule, Table

__all__ = ["prune_there", "unpack_there"]


def prune_there(
    weights: torch.Tensor,
    number_format: NumberFormat,
    rule: Rule,
    *,
    workspace: DeviceWorkspace,
) -> RowStatistics:
    """Decide which weights of a row block stay, and put +0.0 in place of the others.

    Args:
        weights: int16 or int32 [R, C] on the workspace's device, bit patterns, of any strides, and
            written by its stream.
        number_format: Their format.
        rule: What to keep.
        workspace: Buffers to use again.

    Raises:
        NonFiniteRowError: If a weight is NaN or infinite.
        ValueError: If a given mask does not fit the weights.
    """
    check_mask(weights.shape, rule)
    with workspace.active():
        rows = pruning.prune(weights, number_format, rule, out=weights, workspace=workspace)
        workspace.wait()
    return rows


def unpack_there(
    payload: Bytes,
    table: Table,
    layout: RowLayout,
    out: torch.Tensor,
    *,
    workspace: DeviceWorkspace,
) -> None:
    """Decode a row block.

    Args:
        payload: uint8 [bytes] on the host, the rows' records, one after the other, and nothing
            else; they go to the device as they are.
        table: int64 [R, 3], their lines of the row table.
        layout: The tensor's layout.
        out: int16 or int32 [R, C] on the workspace's device, of any strides, to write to.
        workspace: Buffers to use again.

    Raises:
        DamagedRowError: If a record contradicts its line of the table or itself.
    """
    sections = check_payload(payload, table, layout)
    with workspace.active():
        records = unpacking.upload_records(payload, workspace)
        unpacking.unpack(records, sections, table, layout, out, workspace)
