"""How much a model's predictions change when one part of one unit is pruned and nothing else is.

A part is all targets of a unit that play the same role, such as the gate projections of all
experts. Each part has a lane: a few samples that go through the dense model, but for the unit
of the part, where the part is pruned. Up to that unit a lane is the dense one, whose outputs it is
given without being computed; so that the lanes cost half as much as that many walks.

Shapes in names: L tokens of a sample, V words of the vocabulary.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from emp_llm.calibration.lanes import batched, pass_alike
from emp_llm.calibration.tensor_loading import unchanged

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from emp_llm.calibration.sample_walk import Call, Walk
    from emp_llm.calibration.session import Session
    from emp_llm.calibration.tensor_loading import Change
    from emp_llm.tensors.target import Target

__all__ = ["Part", "divergences", "parts_of"]

_TOKENS = 1024
"""Tokens of all samples of a lane, or those of one sample if it is longer."""

_AT_A_TIME = 128
"""Tokens whose predictions are compared at a time."""


@dataclass(frozen=True)
class Part:
    """Targets that are pruned together.

    Attributes:
        unit: Their unit.
        names: Their names.
    """

    unit: str
    names: frozenset[str]

    def only(self, change: Change) -> Change:
        """What changes these targets, and leaves all other tensors as they are."""
        return lambda name, tensor: change(name, tensor) if name in self.names else tensor


def parts_of(units: Mapping[str, Sequence[Target]]) -> list[Part]:
    """The parts of all units: targets whose names differ only in numbers."""
    parts: list[Part] = []
    for unit, targets in units.items():
        kinds: dict[str, set[str]] = {}
        for target in targets:
            kinds.setdefault(re.sub(r"\.\d+(?=\.)", "", target.name), set()).add(target.name)
        parts += [Part(unit, frozenset(names)) for names in kinds.values()]
    return parts


def divergences(session: Session, parts: Iterable[Part], change: Change) -> dict[Part, float]:
    """The Kullback-Leibler divergence of the predictions with each part pruned from the dense ones.

    Args:
        session: The model and its samples, of which the first ones are taken: 1,024 tokens.
        parts: The parts; those of units that no sample comes to are left out.
        change: Prunes all of them.

    Returns:
        Nats per token, the mean over all tokens.

    Raises:
        CheckpointError: If the model does not run, or predicts no next token.
    """
    visited = set(session.visits)
    lanes = [part for part in parts if part.unit in visited]
    count, length = session.samples.ids_NL.shape
    count = min(count, max(1, _TOKENS // length))
    dense: dict[int, torch.Tensor] = {}

    def compare(number: int) -> float:
        lane, sample = divmod(number, count)
        logits_LV = session.logits(sample).float()
        if not lane:
            dense[sample] = logits_LV
            return 0.0
        return _divergence(dense[sample], logits_LV)

    session.begin("measuring how much each part matters")
    with session.walk(samples=count, lanes=1 + len(lanes), forward=compare) as walk:
        _Lanes(session, walk, lanes, count, change).run()
        results = [value for value in walk.results() if isinstance(value, float)]
    _, *of_lanes = batched(results, count)
    return {part: sum(of) / count for part, of in zip(lanes, of_lanes, strict=True)}


class _Lanes:
    """All lanes on their way: the dense one, then one for each part."""

    def __init__(
        self, session: Session, walk: Walk, parts: Sequence[Part], count: int, change: Change
    ) -> None:
        self._session = session
        self._walk = walk
        self._parts = parts
        self._count = count
        self._change = change

    def run(self) -> None:
        session, apart = self._session, set[Part]()
        for unit, calls in session.stops(self._walk):
            dense, *others = batched(calls, self._count)
            used = session.model.multiplied_units(unit)
            pruned: list[tuple[Part, Sequence[Call]]] = []
            own: list[Sequence[Call]] = []
            following: list[Sequence[Call]] = []
            for part, lane in zip(self._parts, others, strict=True):
                if part.unit in used:
                    pruned.append((part, lane))
                elif part in apart:
                    own.append(lane)
                else:
                    following.append(lane)
            session.model.load(unit, unchanged)
            pass_alike(session, self._walk, unit, [dense, *following])
            for lane in own:
                pass_alike(session, self._walk, unit, [lane])
            session.model.release(unit)
            for part, lane in pruned:
                session.pass_on(self._walk, unit, lane, part.only(self._change))
                apart.add(part)


def _divergence(dense_LV: torch.Tensor, pruned_LV: torch.Tensor) -> float:
    """Σ_v p (log p - log q), the mean over tokens; p are the predictions of the dense model."""
    total = 0.0
    parts = (torch.split(logits_LV, _AT_A_TIME) for logits_LV in (dense_LV, pruned_LV))
    for p_TV, q_TV in zip(*parts, strict=True):
        # in float64, for small divergences are what is left of terms that cancel
        logs_TV, others_TV = (torch.log_softmax(some, -1, torch.float64) for some in (p_TV, q_TV))
        total += (logs_TV.exp() * (logs_TV - others_TV)).sum().item()
    return total / len(dense_LV)
