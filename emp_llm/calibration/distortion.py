"""What pruning one matrix changes in its outputs, at several β.

Shapes in names: R rows (outputs) and C columns (inputs) of a matrix; B values of β, P of them.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from emp_llm.calibration.masks import count_magnitudes, mask_by_scores
from emp_llm.calibration.repair import LeastSquares, repair_obs
from emp_llm.calibration.target_pruner import TargetPruner
from emp_llm.report.tensor_statistics import digits

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    from emp_llm.calibration.statistics import Statistics, StatisticsOf
    from emp_llm.checkpoint.open_files import OpenFiles
    from emp_llm.options import PruneOptions, Repair
    from emp_llm.selection.mask_store import MaskStore
    from emp_llm.tensors.target import Target

    Floats = npt.NDArray[np.float64]

__all__ = ["FACTORS", "PROBED", "DistortionSink", "betas_of"]

_STEPS = 32
FACTORS = tuple(2.0 ** (step / _STEPS) for step in range(-_STEPS, _STEPS + 1))
"""What β is multiplied by: from a half to two, 2.2 % apart. In the middle is 1."""

_MEASURED = tuple(range(0, len(FACTORS), _STEPS // 2))
"""Which of them errors are measured at; between these they are interpolated."""

PROBED = _MEASURED[1]
"""Which of them the model is run at: with 0.71 β the error is some four times that with β, far
above what rounding of activations does."""

_ROWS = 64
"""Rows of a matrix that errors are measured on, or fewer."""


def betas_of(beta: float) -> list[float]:
    """β times all factors, to six digits; β itself stays what it is."""
    return [beta if factor == 1 else digits(beta * factor) for factor in FACTORS]


class DistortionSink:
    """Measures how the outputs of targets change, and prunes them at one β for a later walk.

    Args:
        store: Takes masks and repaired weights at that β, and for each target a note: ``kept`` at
            all β, ``errors`` at some of them, both by ascending β.
        options: The rule, criterion and repair.
        files: The targets' files.
        device: Where scores and repairs are computed.
    """

    def __init__(
        self, store: MaskStore, options: PruneOptions, files: OpenFiles, device: torch.device
    ) -> None:
        self._store = store
        self._betas = betas_of(options.beta)
        if options.repair == "swaps":  # errors fall in about the same proportion at each β
            options = replace(options, repair="obs")
        self._options = options
        probed = replace(options, beta=self._betas[PROBED])
        self._pruner = TargetPruner(probed, files, device)

    def has(self, unit: str, *_: object) -> bool:
        """Whether a unit is measured already."""
        return self._store.has(unit)

    def process(
        self, unit: str, targets: Sequence[Target], statistics_of: StatisticsOf, *_: object
    ) -> None:
        """Measure and prune a unit's targets; there are no stages.

        Raises:
            OSError: If the result cannot be written.
        """
        with self._store.writer(unit) as writer:
            for target in targets:
                of_target = partial(statistics_of, target)
                self._pruner.prune(target, of_target, writer)
                kept_B = np.zeros(len(self._betas), np.int64)
                errors_P = np.zeros(len(_MEASURED))
                for matrix in range(target.geometry.matrices):
                    counted, found = self._measure(target, matrix, of_target(matrix))
                    kept_B += counted
                    errors_P += found
                errors_B = _interpolated(errors_P)
                writer.note(target.name, {"kept": kept_B.tolist(), "errors": errors_B.tolist()})

    def changed(self, _name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as it is: all that is measured are inputs of the dense model."""
        return tensor

    def _measure(
        self, target: Target, matrix: int, statistics: Statistics
    ) -> tuple[npt.NDArray[np.int64], Floats]:
        """Counts of a matrix at all β, and at some its relative error times its inputs."""
        options, geometry = self._options, target.geometry
        patterns, weight_RC, scores = self._pruner.scored(target, matrix, statistics)
        counts_BG = count_magnitudes(
            patterns, geometry.number_format, options.granularity, self._betas
        )
        if statistics.hessian_CC is None:
            return counts_BG.sum(1), np.zeros(len(_MEASURED))
        some = slice(None, None, max(1, len(weight_RC) // _ROWS))
        before, after = slice(None), some
        counts_PG = counts_BG[list(_MEASURED)]
        if options.granularity == "row":  # a row needs no other one
            before, after, counts_PG = some, slice(None), counts_PG[:, some]
        errors = []
        for kept_G in counts_PG:
            mask = mask_by_scores(
                target.name,
                scores[before],
                patterns[before],
                geometry.number_format,
                options,
                first_row=matrix * geometry.matrix_rows,
                kept=kept_G,
            ).mask[after]
            bits = np.unpackbits(mask, axis=1, count=geometry.columns, bitorder="little")
            keep_RC = torch.from_numpy(bits).to(weight_RC.device).bool()
            errors.append(_error(weight_RC[some], keep_RC, statistics, options.repair))
        return counts_BG.sum(1), statistics.tokens * np.array(errors)


def _error(
    weight_RC: torch.Tensor, keep_RC: torch.Tensor, statistics: Statistics, repair: Repair
) -> float:
    """The squared error of the outputs of some rows, relative to the outputs themselves.

    Σ_r (w - v) H (w - v)ᵀ / Σ_r w H wᵀ, where v is the row w after pruning and repair.
    """
    hessian_CC = statistics.hessian_CC
    if hessian_CC is None:
        raise ValueError("errors of outputs are computed from the Hessian")
    pruned_RC = weight_RC * keep_RC
    if repair == "obs":
        squares = LeastSquares.of(weight_RC, hessian_CC, tokens=statistics.tokens)
        pruned_RC = repair_obs(squares, keep_RC)
    lost_RC = weight_RC - pruned_RC
    lost, whole = (
        ((some_RC @ hessian_CC) * some_RC).sum(dtype=torch.float64).item()
        for some_RC in (lost_RC, weight_RC)
    )
    return max(lost, 0.0) / whole if whole > 0 else 0.0


def _interpolated(errors_P: Floats) -> Floats:
    """Errors at all β from those at some: their logarithms by a monotone cubic.

    Fritsch & Butland, 1984. Straight lines would have a corner at each β that was measured, and
    no target would get one near it.
    """
    largest = errors_P.max()
    if not largest:
        return np.zeros(len(FACTORS))
    logs_P = np.log(np.maximum(errors_P, largest * 1e-9))
    steps = np.diff(logs_P)
    before, after = steps[:-1], steps[1:]
    falling = (before < 0) & (after < 0)
    inner = np.where(falling, 2 * before * after / np.where(falling, before + after, 1.0), 0.0)
    slopes_P = np.concatenate([steps[:1], inner, steps[-1:]])
    at, left = np.divmod(np.arange(len(FACTORS) - 1), _MEASURED[1])
    t = left / _MEASURED[1]
    curved = (
        t * (1 - t) * ((slopes_P[at] - steps[at]) * (1 - t) + (steps[at] - slopes_P[at + 1]) * t)
    )
    logs_B = np.append(logs_P[at] + steps[at] * t + curved, logs_P[-1])
    errors_B: Floats = np.exp(logs_B)
    return errors_B
