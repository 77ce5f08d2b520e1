"""What becomes of the statistics of a unit's targets: masks at once, or scores stored for later.

A unit is a decoder block, or a module outside of decoder blocks that holds targets.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from emp_llm.calibration.stored_scores import save_scores
from emp_llm.calibration.target_pruner import apply_masks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from emp_llm.calibration.statistics import StatisticsOf
    from emp_llm.calibration.target_pruner import TargetPruner
    from emp_llm.selection.mask_store import MaskStore
    from emp_llm.tensors.target import Target

__all__ = ["MaskSink", "ScoreSink", "Sink", "is_stored", "stage_key"]


class Sink(Protocol):
    """Takes the statistics of the targets of one unit at a time."""

    def has(self, unit: str, stage: int | None = None) -> bool:
        """Whether a unit, or one stage of it, is processed already."""

    def process(
        self,
        unit: str,
        targets: Sequence[Target],
        statistics_of: StatisticsOf,
        stage: int | None = None,
    ) -> None:
        """Process a unit, or one stage of it.

        Args:
            unit: The unit.
            targets: All of its targets, or those of the stage.
            statistics_of: Returns the statistics of each of their matrices.
            stage: Number of the stage, from 0; None where the unit is processed at once.

        Raises:
            OSError: If the result cannot be written.
        """

    def changed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the checkpoint as it is by now; the given one may be changed in place."""


class MaskSink:
    """Prunes targets: their masks, repaired weights and biases go to a store.

    Args:
        store: The store.
        pruner: Scores, masks and repairs targets.
        units: The targets of each unit.
        bias_of: Returns name and values of the bias of a target's layer, if it is to be repaired.
    """

    def __init__(
        self,
        store: MaskStore,
        pruner: TargetPruner,
        units: Mapping[str, Sequence[Target]],
        bias_of: Callable[[Target], tuple[str, torch.Tensor] | None],
    ) -> None:
        self._store = store
        self._pruner = pruner
        self._units = units
        self._bias_of = bias_of
        self._targets = {target.name: target for part in units.values() for target in part}

    def has(self, unit: str, stage: int | None = None) -> bool:
        """Whether the masks of a unit, or of one stage of it, are stored, whole."""
        return is_stored(
            self._store,
            unit,
            stage,
            lambda: all(target.name in self._store for target in self._units[unit]),
        )

    def process(
        self,
        unit: str,
        targets: Sequence[Target],
        statistics_of: StatisticsOf,
        stage: int | None = None,
    ) -> None:
        """Prune targets and store the result.

        Raises:
            OSError: If it cannot be written.
        """
        unreached: list[str] = []
        with self._store.writer(unit if stage is None else stage_key(unit, stage)) as writer:
            for target in targets:
                bias = self._bias_of(target)
                unreached += self._pruner.prune(
                    target, partial(statistics_of, target), writer, bias
                )
            if unreached:
                writer.note("without_tokens", unreached)

    def changed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor with its mask and repair applied, as far as these are stored."""
        if name in self._store:
            return apply_masks(self._store, self._targets[name], tensor)
        data = self._store.replaced(name)
        if data is not None:
            tensor.view(-1).view(torch.uint8).copy_(torch.frombuffer(data, dtype=torch.uint8))
        return tensor


class ScoreSink:
    """Scores targets; the scores wait in files until those of all units are there.

    Args:
        folder: Where the files are.
        pruner: Scores targets.
        criterion: Name of the criterion, for errors.

    Attributes:
        paths: The files, by unit.
    """

    def __init__(self, folder: Path, pruner: TargetPruner, criterion: str) -> None:
        self.paths: dict[str, Path] = {}
        self._folder = folder
        self._pruner = pruner
        self._criterion = criterion

    def has(self, unit: str, *_: object) -> bool:
        """Whether a unit's scores are there."""
        return unit in self.paths

    def process(
        self, unit: str, targets: Sequence[Target], statistics_of: StatisticsOf, *_: object
    ) -> None:
        """Score a unit's targets and write the scores; there are no stages.

        Raises:
            OSError: If they cannot be written.
        """
        path = self._folder / f"scores-{len(self.paths)}.safetensors"
        scores = {
            target.name: self._pruner.target_scores(target, partial(statistics_of, target))
            for target in targets
        }
        save_scores(path, scores, self._criterion)
        self.paths[unit] = path

    def changed(self, _name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as it is; nothing is pruned before all scores are there."""
        return tensor

    def remove(self) -> None:
        """Delete the files."""
        for path in self.paths.values():
            path.unlink()


def stage_key(unit: str, stage: int) -> str:
    """The key in a store of one stage of a unit."""
    return f"{unit}, stage {stage}"


def is_stored(store: MaskStore, unit: str, stage: int | None, complete: Callable[[], bool]) -> bool:
    """Whether a store holds what was made of a unit, or of one stage of it, whole.

    Args:
        store: The store.
        unit: The unit.
        stage: Number of the stage; None for the unit.
        complete: Whether there is something of all targets of the unit. How many stages it has is
            only known to the walk.
    """
    if stage is not None:
        return store.has(stage_key(unit, stage))
    stages = 0
    while store.has(stage_key(unit, stages)):
        stages += 1
    return complete() if stages else store.has(unit)
