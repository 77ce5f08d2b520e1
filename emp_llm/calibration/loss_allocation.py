"""A β for each target, so that the loss rises the least for the number of weights that stay.

    a walk through the dense model   → of each target, the error of its outputs at many β
    a walk in lanes                  → how much the predictions change when one part is pruned
    both                             → of each target, a curve of the loss it causes
    equal slopes                     → the β of each target

The divergence of a model in which one matrix is pruned, from the dense one, is nearly proportional
to the relative error of that matrix's outputs; and the divergences of single matrices add up well
enough (layer-adaptive rate-distortion pruning, Xu et al., ICCV 2023). So a single run for each part
sets the scale of its curve.
"""

from __future__ import annotations

import shutil
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from emp_kernels.rows import Workspace

from emp_llm.calibration.distortion import FACTORS, PROBED, DistortionSink, betas_of
from emp_llm.calibration.forward_walk import ForwardWalk
from emp_llm.calibration.masks import count_magnitudes
from emp_llm.calibration.sensitivity import divergences, parts_of
from emp_llm.calibration.session import Session
from emp_llm.calibration.target_pruner import apply_masks
from emp_llm.selection.allocation import Allocation, Curve, least
from emp_llm.selection.mask_store import MaskStore
from emp_llm.tensors.geometry import RowBlock

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    from emp_llm.calibration.sensitivity import Part
    from emp_llm.calibration.statistics import Need, StatisticsOf
    from emp_llm.checkpoint.open_files import OpenFiles
    from emp_llm.options import Granularity
    from emp_llm.pruning.plan import PruningPlan
    from emp_llm.runtime.progress import SharedProgress
    from emp_llm.tensors.target import Target

    Counts = npt.NDArray[np.int64]

__all__ = ["allocate_by_loss"]

_FOLDER = "allocation"
_USUAL = FACTORS.index(1.0)

_ROUNDS, _POINTS = 4, 33
"""Rounds of the search for a β between two, and how many are tried in each."""


def allocate_by_loss(
    plan: PruningPlan,
    session: Session,
    files: OpenFiles,
    progress: SharedProgress,
    folder: Path,
    needs: frozenset[Need],
    without_data: StatisticsOf,
) -> Allocation:
    """Find the β of each target; together they keep as many weights as the plan's β does.

    Args:
        plan: The targets, and the rule.
        session: The model and its samples.
        files: The checkpoint's files.
        progress: Reports the walks through the model.
        folder: Where what is measured waits, for the same run when it is continued.
        needs: The statistics to gather: those of the criterion, and Hessians.
        without_data: Returns what is known of a matrix without data.

    Raises:
        CheckpointError: If the model does not run, or predicts no next token, or a weight or score
            is not finite.
        OSError: If what is measured cannot be written.
    """
    options, units = plan.options, session.targets
    with MaskStore(folder / _FOLDER) as store:
        sink = DistortionSink(store, options, files, session.device)
        ForwardWalk(session, units, sink, needs, without_data, paired=False).run()
        for unit, targets in units.items():  # those that no sample comes to
            if not sink.has(unit):
                sink.process(unit, targets, without_data)
        of_targets = {target.name: target for targets in units.values() for target in targets}

        def pruned(name: str, tensor: torch.Tensor) -> torch.Tensor:
            return apply_masks(store, of_targets[name], tensor)

        # rounding of bfloat16 changes predictions about as much as pruning a late layer does
        exact = Session(plan, progress, files, folder, torch.float32)
        found = divergences(exact, parts_of(units), pruned)
        curves = _curves(store, found)

    def count(name: str, betas: Sequence[float]) -> Counts:
        return _count(of_targets[name], files, options.granularity, betas)

    allocated = _betas(options.beta, curves, count)
    shutil.rmtree(store.folder)
    return Allocation(betas=allocated)


def _curves(store: MaskStore, found: Mapping[Part, float]) -> dict[str, Curve]:
    """The curve of each target; a single point where nothing is known of its loss.

    That is so where no token reaches a target, or pruning it changes no prediction.
    """
    notes, curves = store.notes, dict[str, Curve]()
    scales: dict[str, float] = {}
    for part, divergence in found.items():
        errors = sum(notes[name]["errors"][PROBED] for name in part.names)
        scales |= dict.fromkeys(part.names, divergence / errors if errors else 0.0)
    for name in store.names:
        kept_B, errors_B = np.array(notes[name]["kept"]), np.array(notes[name]["errors"])
        loss_B = max(scales.get(name, 0.0), 0.0) * errors_B
        some = slice(None) if loss_B.any() else slice(_USUAL, _USUAL + 1)
        curves[name] = Curve(kept_B[some], loss_B[some])
    return curves


def _betas(
    beta: float,
    curves: Mapping[str, Curve],
    count: Callable[[str, Sequence[float]], Counts],
) -> dict[str, float]:
    """The β of each target whose counts have the least sum of losses.

    Args:
        beta: The one that all of them would have.
        curves: By target, with a point for each factor of β, or for β alone.
        count: Counts what a target keeps at some β.
    """
    total = sum(int(curve.kept[len(curve.kept) // 2]) for curve in curves.values())
    found: dict[str, float] = {}
    for (name, curve), kept in zip(curves.items(), least([*curves.values()], total), strict=True):
        tried = betas_of(beta) if len(curve.kept) > 1 else [beta]
        at = int(np.searchsorted(curve.kept, kept))
        if curve.kept[at] == kept:
            found[name] = tried[at]
        else:  # at most one of them is between two points
            low, high = tried[at - 1 : at + 1]
            found[name] = _between(partial(count, name), low, high, kept)
    return found


def _between(
    count: Callable[[Sequence[float]], Counts], low: float, high: float, kept: int
) -> float:
    """A β between two, at which so many weights are kept, or the most below that."""
    for _ in range(_ROUNDS):
        betas = np.linspace(low, high, _POINTS)
        at = int(np.searchsorted(count(betas.tolist()), kept, side="right")) - 1
        if not 0 <= at < _POINTS - 1:
            break
        low, high = betas[at : at + 2].tolist()
    return low


def _count(
    target: Target, files: OpenFiles, granularity: Granularity, betas: Sequence[float]
) -> Counts:
    """How many weights of a target stay at some β, by the effective numbers of its groups."""
    geometry = target.geometry
    kept_B = np.zeros(len(betas), np.int64)
    for matrix in range(geometry.matrices):
        whole = RowBlock(matrix, 0, geometry.matrix_rows)
        patterns = target.read(files.file(target.shard), whole, Workspace())
        kept_B += count_magnitudes(patterns, geometry.number_format, granularity, betas).sum(1)
    return kept_B
