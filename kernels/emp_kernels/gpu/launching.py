"""What every launch over rows needs: the rule as tensors, and a second run for counts in doubt."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from emp_kernels.counting import SLACK, exact_count, exact_sums_of
from emp_kernels.errors import NonFiniteRowError
from emp_kernels.gpu.common import COUNTS_IN_SHARED_MEMORY, scale_exponent, tile_of
from emp_kernels.gpu.decide import DOUBTFUL, GIVEN, NOT_FINITE, PER_ROW, THRESHOLD
from emp_kernels.gpu.histogram import count_equal_rows
from emp_kernels.gpu_workspace import DeviceWorkspace
from emp_kernels.numbers import NumberFormat, patterns_of_tensor
from emp_kernels.rows import Given, Patterns, PerRow, RowStatistics, Rule, Threshold

__all__ = ["RowsOnDevice", "RuleTensors", "Shape", "rows_of"]

_WARPS_A_PROCESSOR = 16
"""Warps of these kernels that fit the registers of a multiprocessor."""

_ROW_BYTES_A_WARP = 16 << 10
"""So the rows under work, of 16 warps on each of an H200's 132 multiprocessors, take 34 MB of its
L2 cache of 50 MB or more: they are read from memory once."""

_WEIGHTS_A_WARP = 256
"""Weights of a tile for each warp: 8 a thread, which it loads as 16 bytes of 16-bit weights."""

_LARGEST_BETA = 1e300
"""A larger β keeps no more, for N_eff is at least 1; but β · N_eff could overflow."""


def rows_of(weights: torch.Tensor) -> torch.Tensor:
    """Rows of patterns, [R, C], whose weights lie side by side; the same tensor if they do.

    Args:
        weights: int16 or int32 [R, C] of any strides. A matrix that is stored input by output is
            copied: kernels would read each of its rows in as many pieces as it has weights.
    """
    return weights if weights.stride(1) == 1 or weights.shape[1] == 1 else weights.contiguous()


@dataclass(frozen=True)
class Shape:
    """How rows are spread over a device.

    Attributes:
        programs: How many programs share the rows.
        warps: How many warps of 32 threads one program has.
        tile: How many weights of a row it handles at a time.
        window: Whether weights near the threshold are counted by `tl.histogram`.
    """

    programs: int
    warps: int
    tile: int
    window: bool

    @classmethod
    def of(cls, weights: torch.Tensor, tile: int | None) -> "Shape":
        """The shape for rows, [R, C].

        Args:
            weights: The rows.
            tile: The tile, a power of two from 16; chosen if None.
        """
        rows, columns = weights.shape
        needed = -(-columns * weights.element_size() // _ROW_BYTES_A_WARP)
        warps = min(max(1 << (needed - 1).bit_length(), 1), 8)
        tile = tile or tile_of(columns, warps * _WEIGHTS_A_WARP)
        if weights.device.type != "cuda":  # interpreted, one after the other
            return cls(2, warps, tile, COUNTS_IN_SHARED_MEMORY)
        processors = torch.cuda.get_device_properties(weights.device).multi_processor_count
        at_once = processors * _WARPS_A_PROCESSOR // warps
        return cls(max(1, min(rows, at_once)), warps, tile, COUNTS_IN_SHARED_MEMORY)


@dataclass(frozen=True)
class RuleTensors:
    """A rule as kernels take it; see `emp_kernels.gpu.decide.decide_row`."""

    kind: int
    beta: torch.Tensor
    limits: torch.Tensor
    threshold: int
    given: torch.Tensor


class RowsOnDevice:
    """Rows of weights on a device, and what a launch over them writes about each.

    Args:
        weights: int16 or int32 [R, C], patterns; weights of a row side by side.
        number_format: Their format.
        workspace: Of the device.

    Attributes:
        table: int64 [R, 3], as in `RowStatistics`.
        stats: float64 [R, 3].
        faults: int32 [R]: 0, NOT_FINITE or DOUBTFUL.
    """

    def __init__(
        self, weights: torch.Tensor, number_format: NumberFormat, workspace: DeviceWorkspace
    ) -> None:
        self.weights = weights
        self.number_format = number_format
        self.workspace = workspace
        rows = len(weights)
        self.table = workspace.on_device("table", rows * 24).view(torch.int64).view(rows, 3)
        self.stats = workspace.on_device("stats", rows * 24).view(torch.float64).view(rows, 3)
        self.faults = workspace.on_device("faults", rows * 4).view(torch.int32)

    def run(
        self,
        rule: Rule,
        launch: Callable[[RuleTensors], None],
        kept: npt.NDArray[np.int64] | None = None,
    ) -> RowStatistics:
        """Launch a kernel, and once more where float64 could not decide a count.

        Args:
            rule: What to keep.
            launch: Launches it; it writes table, stats and faults, and leaves the weights of rows
                with a fault as they are.
            kept: int64 [R], with `PerRow`: how many of each row stay, −1 where the rule says.

        Raises:
            NonFiniteRowError: If a weight is NaN or infinite.
        """
        launch(self.tensors_of(rule, kept))
        table, stats, faults = self._fetched()
        if (faults == NOT_FINITE.value).any():
            raise NonFiniteRowError(int(np.argmax(faults == NOT_FINITE.value)))
        doubtful = faults == DOUBTFUL.value
        if isinstance(rule, PerRow) and doubtful.any():
            # The kernel cannot decide these counts, and does not stop for them: all rows are run
            # once more, with the counts of the first run and the exact ones of rows in doubt. Rows
            # that were pruned in place keep the same weights as before, but their sums are other
            # ones now, so those of the first run are taken.
            kept = table[:, 0].copy()
            for row in np.flatnonzero(doubtful):
                sums = exact_sums_of(self._patterns(int(row)), self.number_format)
                kept[row] = exact_count(*sums, self.weights.shape[1], rule.beta)
            before = stats.copy()
            launch(self.tensors_of(rule, kept))
            table, stats, _ = self._fetched()
            stats[~doubtful] = before[~doubtful]
        return RowStatistics(table, stats)

    def constants(self, rule: RuleTensors, shape: Shape) -> dict[str, Any]:
        """What every kernel over rows is compiled for, and how it is launched."""
        return {
            "RULE": rule.kind,
            "WITH_WINDOW": shape.window,
            "COLUMNS": self.weights.shape[1],
            "KEY_MASK": self.number_format.key_mask,
            "INFINITY": self.number_format.infinity,
            "MANTISSA": self.number_format.mantissa_bits,
            "SCALE": scale_exponent(self.number_format),
            "TILE": shape.tile,
            "num_warps": shape.warps,
            "enable_fp_fusion": True,
        }

    def tensors_of(self, rule: Rule, kept: npt.NDArray[np.int64] | None = None) -> RuleTensors:
        """A rule for these rows; arguments as for `run`."""
        device, upload = self.workspace.device, self.workspace.upload
        beta = min(rule.beta, _LARGEST_BETA) * SLACK if isinstance(rule, PerRow) else 0.0
        beta_slack = upload("beta", np.array([beta])).view(torch.float64)
        if isinstance(rule, Given):
            return RuleTensors(GIVEN.value, beta_slack, self.faults, 0, upload("given", rule.mask))
        if isinstance(rule, Threshold):
            ties = self._ties(rule).to(torch.int32)
            return RuleTensors(THRESHOLD.value, beta_slack, ties, rule.key, beta_slack)
        if kept is None:
            limits = torch.full((len(self.weights),), -1, dtype=torch.int32, device=device)
        else:
            limits = upload("limits", kept.astype(np.int32)).view(torch.int32)
        return RuleTensors(PER_ROW.value, beta_slack, limits, 0, beta_slack)

    def _ties(self, rule: Threshold) -> torch.Tensor:
        """How many of the keys that equal the threshold stay in each row: the first in order.

        Returns:
            An integer tensor, [R]; C where all of them do.
        """
        rows, columns = self.weights.shape
        if not 0 < rule.ties < rows * columns:
            return torch.full((rows,), columns if rule.ties else 0, device=self.workspace.device)
        equal = count_equal_rows(self.weights, self.number_format, rule.key, self.workspace)
        before = equal.cumsum(0) - equal
        return torch.minimum((rule.ties - before).clamp(min=0), equal)

    def _fetched(
        self,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], npt.NDArray[np.int32]]:
        download = self.workspace.download
        table, stats = download("table", self.table), download("stats", self.stats)
        faults = download("faults", self.faults)
        self.workspace.wait()
        return (
            table.view(np.int64).reshape(-1, 3).copy(),
            stats.view(np.float64).reshape(-1, 3).copy(),
            faults.view(np.int32).copy(),
        )

    def _patterns(self, row: int) -> Patterns:
        return patterns_of_tensor(self.weights[row].cpu())
