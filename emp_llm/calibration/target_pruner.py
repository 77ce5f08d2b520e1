"""Prunes one target from data: scores by a criterion, mask by the rule, repair.

Shapes in names: R rows (outputs) and C columns (inputs) of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from emp_kernels.errors import NonFiniteRowError
from emp_kernels.numbers import patterns_of_tensor, tensor_of_patterns, torch_integers
from emp_kernels.rows import Workspace

from emp_llm.calibration.criteria import score
from emp_llm.calibration.criterion_registry import find_criterion
from emp_llm.calibration.freed_memory import give_back
from emp_llm.calibration.hessian import Worth
from emp_llm.calibration.masks import mask_by_scores
from emp_llm.calibration.repair import LeastSquares, bias_change, repair_obs
from emp_llm.calibration.swaps import repair_by_swaps
from emp_llm.selection.allocation import Allocation, spread
from emp_llm.tensors.geometry import RowBlock

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy.typing as npt
    from emp_kernels.rows import Bytes, Patterns

    from emp_llm.calibration.statistics import Statistics
    from emp_llm.checkpoint.open_files import OpenFiles
    from emp_llm.options import PruneOptions
    from emp_llm.report.tensor_statistics import Group
    from emp_llm.selection.mask_store import MaskStore
    from emp_llm.selection.mask_writer import MaskWriter
    from emp_llm.tensors.target import Target

__all__ = ["TargetPruner", "apply_masks", "read_matrix"]

_ROWS_AT_A_TIME = 1024


@dataclass(frozen=True)
class _MatrixMask:
    """What stays of one matrix, and the sums of its scores; as `MaskWriter.add` takes them."""

    mask: Bytes
    stats: npt.NDArray[np.float64]
    groups: Sequence[Group]


class TargetPruner:
    """Scores, masks and repairs targets, matrix by matrix.

    Args:
        options: The rule, criterion and repair.
        files: The targets' files.
        device: Where scores and repairs are computed.
        masks: Masks that are decided already; None to decide them by scores.
        allocation: How many weights each target keeps, where that is not the same β for all.
    """

    def __init__(
        self,
        options: PruneOptions,
        files: OpenFiles,
        device: torch.device,
        masks: MaskStore | None = None,
        allocation: Allocation | None = None,
    ) -> None:
        self._criterion = find_criterion(options.criterion)
        self._magnitude = find_criterion("magnitude")
        self._options = options
        self._files = files
        self._device = device
        self._masks = masks
        self._worth = Worth()
        self._allocation = allocation or Allocation()

    def target_scores(
        self, target: Target, statistics_of: Callable[[int], Statistics]
    ) -> npt.NDArray[np.float32]:
        """The scores of all matrices of a target, float32 [R, C], or [E, R, C] of E matrices.

        Args:
            target: The target.
            statistics_of: Returns the statistics of each of its matrices, by number.

        Raises:
            CheckpointError: If the target cannot be read, or a weight is not finite.
        """
        scores = []
        for matrix in range(target.geometry.matrices):
            scores.append(self.scored(target, matrix, statistics_of(matrix))[2])
        return scores[0] if len(scores) == 1 else np.stack(scores)

    def scored(
        self, target: Target, matrix: int, statistics: Statistics
    ) -> tuple[Patterns, torch.Tensor, npt.NDArray[np.float32]]:
        """The bit patterns, values and scores of a matrix of a target, each [R, C].

        Raises:
            CheckpointError: If it cannot be read, or a weight is not finite.
        """
        patterns, weight_RC = read_matrix(target, matrix, self._files, self._device)
        scores_RC, _ = self._scores(weight_RC, statistics)
        return patterns, weight_RC, scores_RC.cpu().numpy()

    def prune(
        self,
        target: Target,
        statistics_of: Callable[[int], Statistics],
        writer: MaskWriter,
        bias: tuple[str, torch.Tensor] | None = None,
    ) -> list[str]:
        """Write the masks of a target, and its repaired weights or biases.

        Args:
            target: The target.
            statistics_of: Returns the statistics of each of its matrices, by number.
            writer: Takes the result.
            bias: Name and values of its layer's bias, if that is to be repaired.

        Returns:
            Names of the matrices that no token has reached; they are masked by magnitude.

        Raises:
            CheckpointError: If the target cannot be read, or a weight or score is not finite.
            OSError: If the result cannot be written.
        """
        unreached: list[str] = []
        for matrix in range(target.geometry.matrices):
            patterns, weight_RC = read_matrix(target, matrix, self._files, self._device)
            statistics = statistics_of(matrix)
            mask = self._mask(target, matrix, patterns, weight_RC, statistics, unreached)
            mask, repaired = self._repaired(target, mask, weight_RC, statistics)
            writer.add(target.name, mask.mask, mask.stats, mask.groups, repaired)
            if bias is not None and statistics.means_C is not None:
                self._repair_bias(writer, bias, weight_RC, mask.mask, statistics.means_C)
            # the next matrix and its statistics may take as much memory
            del patterns, weight_RC, statistics, mask, repaired
            give_back()
        return unreached

    def _scores(self, weight_RC: torch.Tensor, statistics: Statistics) -> tuple[torch.Tensor, bool]:
        """The scores of a matrix, and whether they are the criterion's own.

        A matrix that no token has reached, such as an expert that no router chose, is scored by
        magnitude.
        """
        gradient_RC = statistics.gradient_RC
        no_gradient = gradient_RC is not None and not gradient_RC.any()
        reached = not self._criterion.needs or (statistics.tokens > 0 and not no_gradient)
        criterion = self._criterion if reached else self._magnitude
        scores_RC = score(criterion, weight_RC, statistics)
        give_back()
        return scores_RC, reached

    def _mask(
        self,
        target: Target,
        matrix: int,
        patterns: Patterns,
        weight_RC: torch.Tensor,
        statistics: Statistics,
        unreached: list[str],
    ) -> _MatrixMask:
        name, rows = target.name, target.geometry.matrix_rows
        first = matrix * rows
        if self._masks is not None:
            return _MatrixMask(
                self._masks.read_mask(name, first, first + rows),
                self._masks.stats(name, first, first + rows),
                self._masks.groups(name)[matrix : matrix + 1],
            )
        scores_RC, own = self._scores(weight_RC, statistics)
        if not own:
            unreached.append(_matrix_name(target, matrix))
        masked = mask_by_scores(
            name,
            scores_RC.cpu().numpy(),
            patterns,
            target.geometry.number_format,
            replace(self._options, beta=self._allocation.betas.get(name, self._options.beta)),
            first_row=first,
            kept=self._kept(target, matrix),
        )
        groups = () if masked.group is None else (masked.group,)
        return _MatrixMask(masked.mask, masked.stats, groups)

    def _repaired(
        self, target: Target, mask: _MatrixMask, weight_RC: torch.Tensor, statistics: Statistics
    ) -> tuple[_MatrixMask, Patterns | None]:
        """The mask and the repaired weights of a matrix.

        Where nothing is repaired, or the new weights would not be finite, the mask is the given one
        and there are no weights.
        """
        hessian_CC, repair = statistics.hessian_CC, self._options.repair
        if hessian_CC is None or repair not in ("obs", "swaps"):
            return mask, None
        squares = LeastSquares.of(
            weight_RC, hessian_CC, statistics.gap_CC, tokens=statistics.tokens
        )
        keep_RC = _keep(mask.mask, weight_RC).bool()
        if repair == "obs":
            return mask, _stored_patterns(target, repair_obs(squares, keep_RC))
        keep_RC, repaired_RC = repair_by_swaps(squares, keep_RC, self._worth(hessian_CC))
        repaired = _stored_patterns(target, repaired_RC)
        if repaired is None:
            return mask, None
        stats = mask.stats.copy()
        scores_RC, _ = self._scores(weight_RC, statistics)
        kept_R = torch.where(keep_RC, scores_RC, 0.0).sum(1, dtype=torch.float64)
        stats[:, 2] = kept_R.cpu().numpy()
        bits = np.packbits(keep_RC.cpu().numpy(), axis=1, bitorder="little")
        return replace(mask, mask=bits, stats=stats), repaired

    def _kept(self, target: Target, matrix: int) -> npt.NDArray[np.int64] | None:
        """How many weights of each group of a matrix stay, where the rule does not say so."""
        total = self._allocation.kept.get(target.name)
        if total is None:
            return None
        geometry = target.geometry
        groups = 1 if self._options.granularity == "layer" else geometry.matrix_rows
        first = matrix * groups
        return spread(total, geometry.matrices * groups)[first : first + groups]

    def _repair_bias(
        self,
        writer: MaskWriter,
        bias: tuple[str, torch.Tensor],
        weight_RC: torch.Tensor,
        mask: Bytes,
        means_C: torch.Tensor,
    ) -> None:
        """Write the repaired bias, unless it would not be finite."""
        name, values_R = bias
        pruned_RC = weight_RC * _keep(mask, weight_RC)
        change_R = bias_change(weight_RC, pruned_RC, means_C).cpu()
        # an overflow in float16 leaves the bias as it is: the pruned layer still works
        repaired_R = (values_R.double() + change_R).to(values_R.dtype)
        if torch.isfinite(repaired_R).all():
            writer.replace(name, repaired_R.view(torch.uint8).numpy().tobytes())


def read_matrix(
    target: Target, matrix: int, files: OpenFiles, device: torch.device
) -> tuple[Patterns, torch.Tensor]:
    """A matrix of a target: its bit patterns, and its values, float32 [R, C].

    Args:
        target: The target.
        matrix: Number of the matrix in it.
        files: The checkpoint's files.
        device: Where the values are put.

    Raises:
        CheckpointError: If it cannot be read, or holds NaN or infinity.
    """
    whole = RowBlock(matrix, 0, target.geometry.matrix_rows)
    patterns = target.read(files.file(target.shard), whole, Workspace())
    values = tensor_of_patterns(patterns).view(target.geometry.number_format.torch_dtype)
    weight_RC = values.to(device, torch.float32)
    # a few rows at a time: a mask of the whole matrix would be a quarter of it again
    some = torch.split(weight_RC, _ROWS_AT_A_TIME)
    finite_R = torch.cat([torch.isfinite(some_RC).all(dim=1) for some_RC in some])
    if not finite_R.all():
        row = int((~finite_R).int().argmax())
        raise target.not_finite(whole, NonFiniteRowError(row))
    return patterns, weight_RC


def _matrix_name(target: Target, matrix: int) -> str:
    """What a matrix of a target is called in reports."""
    return f"{target.name}[{matrix}]" if target.geometry.matrices > 1 else target.name


def _stored_patterns(target: Target, weight_RC: torch.Tensor) -> Patterns | None:
    """Weights as bit patterns in the checkpoint's format; None if some would not be finite."""
    stored_RC = weight_RC.cpu().to(target.geometry.number_format.torch_dtype)
    return patterns_of_tensor(stored_RC) if torch.isfinite(stored_RC).all() else None


def _keep(mask: Bytes, weight_RC: torch.Tensor) -> torch.Tensor:
    """A mask of bits as bytes, uint8 [R, C] of 0 and 1, on the weights' device."""
    bits = np.unpackbits(mask, axis=1, count=weight_RC.shape[1], bitorder="little")
    return torch.from_numpy(bits).to(weight_RC.device)


def apply_masks(store: MaskStore, target: Target, tensor: torch.Tensor) -> torch.Tensor:
    """Apply the masks and the repair of a target, in place.

    Args:
        store: Holds them.
        target: The target.
        tensor: Its weights, in the shape and dtype that the checkpoint has.

    Returns:
        The same tensor.

    Raises:
        CheckpointError: If the masks cannot be read.
    """
    geometry = target.geometry
    # as integers: whatever a weight is, even NaN, its bits times 0 or 1 are what they shall be
    integers = tensor.view(torch_integers(tensor.itemsize))
    matrices = integers.reshape(geometry.matrices, *geometry.shape[-2:])
    for matrix, stored in enumerate(matrices):
        rows_RC = stored.T if geometry.transposed else stored
        for start in range(0, len(rows_RC), _ROWS_AT_A_TIME):
            some_RC = rows_RC[start : start + _ROWS_AT_A_TIME]
            first = matrix * len(rows_RC) + start
            stop = first + len(some_RC)
            repaired = store.weights(target.name, first, stop)
            if repaired is not None:
                some_RC.copy_(tensor_of_patterns(repaired))
            some_RC.mul_(_keep(store.read_mask(target.name, first, stop), some_RC))
    return tensor
