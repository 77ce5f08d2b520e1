"""Prunes rows of weights on a GPU: writes +0.0 for pruned weights, or only the masks."""

import numpy as np
import numpy.typing as npt
import torch

from emp_kernels.gpu.launching import RowsOnDevice, RuleTensors, Shape, rows_of
from emp_kernels.gpu.prune_kernel import prune_kernel
from emp_kernels.gpu_workspace import DeviceWorkspace
from emp_kernels.numbers import F32, NumberFormat
from emp_kernels.rows import PerRow, RowStatistics, Rule, Threshold

__all__ = ["PruneLaunch", "prune", "select"]


class PruneLaunch:
    """The kernel that prunes rows.

    Args:
        weights: int16 or int32 [R, C], patterns; weights of a row side by side.
        number_format: Their format.
        out: As weights, or weights themselves; or uint8 [R, ⌈C/8⌉] for masks.
        workspace: Of the device.
        tile: Weights of a row that are handled at a time; a power of two.

    Attributes:
        rows: The rows, and what was decided once it has run.
    """

    def __init__(
        self,
        weights: torch.Tensor,
        number_format: NumberFormat,
        out: torch.Tensor,
        workspace: DeviceWorkspace,
        *,
        tile: int | None = None,
    ) -> None:
        self.rows = RowsOnDevice(weights, number_format, workspace)
        self._out = out
        self._shape = Shape.of(weights, tile)

    def __call__(self, rule: RuleTensors) -> None:
        """Put it on the stream."""
        rows = self.rows
        prune_kernel[(self._shape.programs,)](
            rows.weights,
            rule.given,
            rule.beta,
            rule.limits,
            self._out,
            rows.table,
            rows.stats,
            rows.faults,
            len(rows.weights),
            rule.threshold,
            rows.weights.stride(0),
            self._out.stride(0),
            MASK=self._out.dtype == torch.uint8,
            **rows.constants(rule, self._shape),
        )


def prune(
    weights: torch.Tensor,
    number_format: NumberFormat,
    rule: Rule,
    *,
    out: torch.Tensor,
    workspace: DeviceWorkspace,
    tile: int | None = None,
) -> RowStatistics:
    """Put +0.0 in place of the weights that go; as `emp_kernels.dispatch.prune_rows`.

    Args:
        weights: int16 or int32 [R, C] on the workspace's device, patterns, of any strides.
        number_format: Their format.
        rule: What to keep.
        out: Where to write, as weights or weights itself.
        workspace: Buffers to use again.
        tile: Weights of a row that are handled at a time; a power of two.

    Raises:
        NonFiniteRowError: If a weight is NaN or infinite.
    """
    rows = rows_of(weights)
    place = out if rows_of(out) is out else torch.empty_like(rows)
    launch = PruneLaunch(rows, number_format, place, workspace, tile=tile)
    decided = launch.rows.run(rule, launch)
    if place is not out:
        out.copy_(place)
    return decided


def select(
    scores: torch.Tensor,
    rule: PerRow | Threshold,
    *,
    kept: npt.NDArray[np.int64] | None = None,
    workspace: DeviceWorkspace,
    tile: int | None = None,
) -> tuple[RowStatistics, torch.Tensor]:
    """Decide which scores stay; as `emp_kernels.dispatch.select_rows`.

    Args:
        scores: int32 [R, C] on the workspace's device, patterns of float32, of any strides.
        rule: What to keep.
        kept: int64 [R], from 0 to C: with `PerRow`, how many of each row stay, whatever β is.
        workspace: Buffers to use again; the mask lies in them.
        tile: Scores of a row that are handled at a time; a power of two.

    Returns:
        What was decided, and the mask, uint8 [R, ⌈C/8⌉] on the device.

    Raises:
        NonFiniteRowError: If a score is NaN or infinite.
    """
    rows, columns = scores.shape
    nbytes = -(-columns // 8)
    mask = workspace.on_device("mask", rows * nbytes).view(rows, nbytes)
    launch = PruneLaunch(rows_of(scores), F32, mask, workspace, tile=tile)
    return launch.rows.run(rule, launch, kept), mask
