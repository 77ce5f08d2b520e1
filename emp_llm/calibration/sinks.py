"""Where what is known of a part of the model leads: to decisions, or to scores that wait."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch

from emp_llm.calibration.masks import save_scores
from emp_llm.calibration.target_judge import pruned

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from emp_llm.calibration.statistics import Known
    from emp_llm.calibration.target_judge import Judge
    from emp_llm.selection.mask_store import MaskStore
    from emp_llm.tensors.target import Target

__all__ = ["Decisions", "Scores", "Sink"]


class Sink(Protocol):
    """Settles on the targets of one part of the model at a time."""

    def has(self, unit: str, stage: int | None = None) -> bool:
        """Whether a part is settled already, or one stage of it."""

    def settle(
        self, unit: str, targets: Sequence[Target], known: Known, stage: int | None = None
    ) -> None:
        """Settle on a part, or on one stage of it.

        Args:
            unit: The part.
            targets: All of its targets, or those of the stage.
            known: What is known of each matrix of theirs.
            stage: Which one it is, from 0.
        """

    def changed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the checkpoint as it is by now; the given one may be changed."""


class Decisions:
    """Decides on targets, and writes it down.

    Args:
        store: Where to.
        judge: Decides.
        units: The targets of each part of the model.
        biases: Gives name and values of the biases of a target's layer, if they are to be repaired.
    """

    def __init__(
        self,
        store: MaskStore,
        judge: Judge,
        units: Mapping[str, Sequence[Target]],
        biases: Callable[[Target], tuple[str, torch.Tensor] | None],
    ) -> None:
        self._store = store
        self._judge = judge
        self._units = units
        self._biases = biases
        self._targets = {target.name: target for part in units.values() for target in part}

    def has(self, unit: str, stage: int | None = None) -> bool:
        """Whether a part's decisions, or those of one stage of it, are written down, whole."""
        if stage is not None:
            return self._store.has(_key(unit, stage))
        stages = 0
        while self._store.has(_key(unit, stages)):
            stages += 1
        if stages:
            return all(target.name in self._store for target in self._units[unit])
        return self._store.has(unit)

    def settle(
        self, unit: str, targets: Sequence[Target], known: Known, stage: int | None = None
    ) -> None:
        """Decide on targets. OSErrors pass."""
        unreached: list[str] = []
        with self._store.writer(unit if stage is None else _key(unit, stage)) as block:
            for target in targets:
                found = partial(known, target)
                unreached += self._judge.judge(target, found, block, self._biases(target))
            if unreached:
                block.note("without_tokens", unreached)

    def changed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as the decisions leave it."""
        if name in self._store:
            return pruned(self._store, self._targets[name], tensor)
        data = self._store.replaced(name)
        if data is not None:
            tensor.view(-1).view(torch.uint8).copy_(torch.frombuffer(data, dtype=torch.uint8))
        return tensor


class Scores:
    """Lets scores wait on disk until all of them are there.

    Args:
        folder: Where.
        judge: Scores.
        criterion: What makes the scores, for errors.

    Attributes:
        paths: The files, by the part that they are of.
    """

    def __init__(self, folder: Path, judge: Judge, criterion: str) -> None:
        self.paths: dict[str, Path] = {}
        self._folder = folder
        self._judge = judge
        self._criterion = criterion

    def has(self, unit: str, _stage: int | None = None) -> bool:
        """Whether a part's scores are there."""
        return unit in self.paths

    def settle(
        self, unit: str, targets: Sequence[Target], known: Known, _stage: int | None = None
    ) -> None:
        """Score a part's targets, always all of them at once. OSErrors pass."""
        path = self._folder / f"scores-{len(self.paths)}.safetensors"
        values = {
            target.name: self._judge.stack(target, partial(known, target)) for target in targets
        }
        save_scores(path, values, self._criterion)
        self.paths[unit] = path

    def changed(self, _name: str, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor; nothing is pruned before all scores are there."""
        return tensor

    def remove(self) -> None:
        """Take the files away."""
        for path in self.paths.values():
            path.unlink()


def _key(unit: str, stage: int) -> str:
    return f"{unit}, stage {stage}"
