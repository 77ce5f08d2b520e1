"""What becomes of one target, once its statistics are known: scores, mask, repair.

Shapes in names: R rows (outputs) and C columns (inputs) of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from emp_kernels.errors import NonFiniteRowError
from emp_kernels.numbers import patterns_of_tensor, tensor_of_patterns, torch_integers
from emp_kernels.rows import Workspace

from emp_llm.calibration.criteria import score
from emp_llm.calibration.criterion_registry import find_criterion
from emp_llm.calibration.freed_memory import give_back
from emp_llm.calibration.masks import decide
from emp_llm.calibration.repair import bias_change, repair_obs
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

__all__ = ["Judge", "matrix_name", "pruned"]

_ROWS = 1024
"""Rows that are looked at at a time."""


def matrix_name(target: Target, matrix: int) -> str:
    """What a matrix of a target is called."""
    return f"{target.name}[{matrix}]" if target.geometry.matrices > 1 else target.name


@dataclass(frozen=True)
class _Mask:
    """What stays of one matrix, and why."""

    bits: Bytes
    stats: npt.NDArray[np.float64]
    groups: Sequence[Group]


class Judge:
    """Decides on targets.

    Args:
        options: The rule.
        files: The targets' files.
        device: Where scores are computed.
        given: Masks that are known already; None to decide them.
    """

    def __init__(
        self,
        options: PruneOptions,
        files: OpenFiles,
        device: torch.device,
        given: MaskStore | None = None,
    ) -> None:
        self.criterion = find_criterion(options.criterion)
        self._magnitude = find_criterion("magnitude")
        self._options = options
        self._files = files
        self._device = device
        self._given = given

    def weights(self, target: Target, matrix: int) -> tuple[Patterns, torch.Tensor]:
        """A matrix of a target: its bit patterns, and its values, float32 [R, C].

        Raises:
            CheckpointError: If it cannot be read, or holds NaN or infinity.
        """
        whole = RowBlock(matrix, 0, target.geometry.matrix_rows)
        patterns = target.read(self._files.file(target.shard), whole, Workspace())
        values = tensor_of_patterns(patterns)
        weight_RC = values.view(target.geometry.number_format.torch_dtype).to(
            self._device, torch.float32
        )
        some = torch.split(weight_RC, _ROWS)
        finite_R = torch.cat([torch.isfinite(some_RC).all(dim=1) for some_RC in some])
        if not finite_R.all():
            row = int((~finite_R).int().argmax())
            raise target.not_finite(whole, NonFiniteRowError(row))
        return patterns, weight_RC

    def scores(self, weight_RC: torch.Tensor, found: Statistics) -> tuple[torch.Tensor, bool]:
        """The scores of a matrix, and whether they are the criterion's own.

        A matrix that no token has reached is ranked by magnitude.
        """
        gradient_RC = found.gradient_RC
        blank = gradient_RC is not None and not gradient_RC.any()
        reached = not self.criterion.needs or (found.tokens > 0 and not blank)
        scores_RC = score(self.criterion if reached else self._magnitude, weight_RC, found)
        give_back()
        return scores_RC, reached

    def stack(
        self, target: Target, statistics: Callable[[int], Statistics]
    ) -> npt.NDArray[np.float32]:
        """The scores of all matrices of a target, float32 [R, C], or [E, R, C] of several.

        Args:
            target: The target.
            statistics: Gives what is known of each matrix of it.

        Raises:
            CheckpointError: As `judge` does.
        """
        scores = []
        for matrix in range(target.geometry.matrices):
            _, weight_RC = self.weights(target, matrix)
            scores_RC, _ = self.scores(weight_RC, statistics(matrix))
            scores.append(scores_RC.cpu().numpy())
        return scores[0] if len(scores) == 1 else np.stack(scores)

    def judge(
        self,
        target: Target,
        statistics: Callable[[int], Statistics],
        writer: MaskWriter,
        bias: tuple[str, torch.Tensor] | None = None,
    ) -> list[str]:
        """Decide on a target, and write it down.

        Args:
            target: The target.
            statistics: Gives what is known of each matrix of it.
            writer: Where to.
            bias: Name and values of the biases of its layer, to be repaired.

        Returns:
            The matrices that no token has reached.

        Raises:
            CheckpointError: If the target cannot be read, or a weight or score is not finite.
        """
        unreached: list[str] = []
        for matrix in range(target.geometry.matrices):
            patterns, weight_RC = self.weights(target, matrix)
            found = statistics(matrix)
            mask = self._mask(target, matrix, patterns, weight_RC, found, unreached)
            changed = None
            if self._options.repair == "obs" and found.hessian_CC is not None:
                changed = self._repaired(target, weight_RC, mask, found)
            writer.add(target.name, mask.bits, mask.stats, mask.groups, changed)
            if bias is not None and found.means_C is not None:
                name, values_R = bias
                pruned_RC = weight_RC * _keep(mask.bits, weight_RC)
                change_R = bias_change(weight_RC, pruned_RC, found.means_C).cpu()
                moved_R = (values_R.double() + change_R).to(values_R.dtype)
                if torch.isfinite(moved_R).all():
                    writer.replace(name, moved_R.view(torch.uint8).numpy().tobytes())
            del patterns, weight_RC, found, mask, changed
            give_back()
        return unreached

    def _mask(
        self,
        target: Target,
        matrix: int,
        patterns: Patterns,
        weight_RC: torch.Tensor,
        found: Statistics,
        unreached: list[str],
    ) -> _Mask:
        name, rows = target.name, target.geometry.matrix_rows
        first = matrix * rows
        if self._given is not None:
            return _Mask(
                self._given.read_mask(name, first, first + rows),
                self._given.stats(name, first, first + rows),
                self._given.groups(name)[matrix : matrix + 1],
            )
        scores_RC, own = self.scores(weight_RC, found)
        if not own:
            unreached.append(matrix_name(target, matrix))
        decided = decide(
            name,
            scores_RC.cpu().numpy(),
            patterns,
            target.geometry.number_format,
            self._options,
            first_row=first,
        )
        groups = () if decided.group is None else (decided.group,)
        return _Mask(decided.mask, decided.stats, groups)

    def _repaired(
        self, target: Target, weight_RC: torch.Tensor, mask: _Mask, found: Statistics
    ) -> Patterns | None:
        """New bit patterns of a matrix; None if some would not be finite."""
        assert found.hessian_CC is not None  # noqa: S101 (the caller has looked)
        keep_RC = _keep(mask.bits, weight_RC).bool()
        changed_RC = repair_obs(weight_RC, keep_RC, found.hessian_CC, found.cross_CC)
        stored_RC = changed_RC.cpu().to(target.geometry.number_format.torch_dtype)
        if not torch.isfinite(stored_RC).all():
            return None
        return patterns_of_tensor(stored_RC)


def _keep(mask: Bytes, weight_RC: torch.Tensor) -> torch.Tensor:
    """A mask, one byte a weight: uint8 [R, C], on the weights' device."""
    bits = np.unpackbits(mask, axis=1, count=weight_RC.shape[1], bitorder="little")
    return torch.from_numpy(bits).to(weight_RC.device)


def pruned(store: MaskStore, target: Target, tensor: torch.Tensor) -> torch.Tensor:
    """A target as the decisions on it leave it.

    Args:
        store: Knows the target.
        target: The target.
        tensor: Its weights, as the checkpoint has them; changed.

    Returns:
        The same tensor.
    """
    geometry = target.geometry
    integers = tensor.view(torch_integers(tensor.itemsize))
    matrices = integers.reshape(geometry.matrices, *geometry.shape[-2:])
    for matrix, stored in enumerate(matrices):
        rows_RC = stored.T if geometry.transposed else stored
        for start in range(0, len(rows_RC), _ROWS):
            some_RC = rows_RC[start : start + _ROWS]
            first = matrix * len(rows_RC) + start
            stop = first + len(some_RC)
            changed = store.weights(target.name, first, stop)
            if changed is not None:
                some_RC.copy_(tensor_of_patterns(changed))
            some_RC.mul_(_keep(store.read_mask(target.name, first, stop), some_RC))
    return tensor
