"""The walk that most criteria take: parts of the model are settled as the samples come to them.

    load a part → gather what its targets are multiplied by → settle → the samples go on

Where outputs are to be restored to those of the dense model, the samples go through it twice side
by side, through the pruned parts and through the dense ones. A part is then settled in stages, in
the order in which its targets come: what a later one is multiplied by is gathered once the earlier
ones are pruned, so that no error is made up for twice.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from emp_llm.calibration.input_statistics import Gathering, PartedError, Products

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import torch

    from emp_llm.calibration.sample_walk import Call, Walk
    from emp_llm.calibration.session import Session
    from emp_llm.calibration.sinks import Sink
    from emp_llm.calibration.statistics import Known, Need, Statistics
    from emp_llm.calibration.streamed_model import Fed, Weights
    from emp_llm.tensors.target import Target

__all__ = ["Forward", "unchanged"]


def unchanged(_name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as the checkpoint has it."""
    return tensor


class Forward:
    """One walk of all samples.

    Args:
        session: The model and its samples.
        units: The targets of each part of the model.
        sink: Settles on them.
        needs: What it needs to know.
        blank: Tells what is known of a matrix without data.
        paired: Whether the dense model's inputs are to be known as well.
    """

    def __init__(
        self,
        session: Session,
        units: Mapping[str, Sequence[Target]],
        sink: Sink,
        needs: frozenset[Need],
        blank: Known,
        *,
        paired: bool,
    ) -> None:
        self._session = session
        self._units = units
        self._sink = sink
        self._needs = needs
        self._blank = blank
        self._paired = paired
        self._tokens = session.samples.ids_NL.shape[1]
        self._changed = sink.changed if session.options.sequential else unchanged

    def run(self) -> None:
        """Settle on every part that samples come to and that is not settled yet."""
        session, count = self._session, len(self._session.samples.ids_NL)
        left = {unit for unit in self._units if not self._sink.has(unit)}
        session.begin("calibrating")
        with session.walk(lanes=2 if self._paired else 1) as walk:
            for unit, calls in session.stops(walk):
                own, dense = calls[:count], calls[count:]
                if unit in left:
                    left.remove(unit)
                    if self._paired:
                        self._settle_in_stages(walk, unit, own, dense)
                    else:
                        self._settle_at_once(walk, unit, own)
                if not left:
                    return
                for lane, change in ((own, self._changed), (dense, unchanged)):
                    if lane:
                        session.pass_on(walk, unit, lane, change)

    def _settle_at_once(self, walk: Walk, unit: str, calls: Sequence[Call]) -> None:
        targets = self._units[unit]
        known = self._seen_at_once(walk, unit, calls, targets)
        # the part's weights are gone by now
        self._sink.settle(unit, targets, known)

    def _seen_at_once(
        self, walk: Walk, unit: str, calls: Sequence[Call], targets: Sequence[Target]
    ) -> Known:
        session = self._session
        session.load(unit, self._changed)
        feeds = session.model.feeds(unit, [target.name for target in targets])
        parameters = session.model.parameters(unit)

        def gather(gathering: Gathering) -> None:
            for call in calls:
                with walk.present(call), Products(parameters, gathering.observe):
                    session.pass_block(walk, unit, call)
                gathering.forget_last()

        known = self._known(feeds, gather)
        session.model.release(unit)
        return known

    def _settle_in_stages(
        self, walk: Walk, unit: str, own: Sequence[Call], dense: Sequence[Call]
    ) -> None:
        session, model = self._session, self._session.model
        session.load(unit, unchanged)
        feeds = model.feeds(unit, [target.name for target in self._units[unit]])
        dense_weights = model.parameters(unit)
        for stage, targets in enumerate(self._stages(walk, unit, own[0], feeds)):
            if self._sink.has(unit, stage):
                continue
            names = {target.name for target in targets}
            if stage:
                session.load(unit, self._changed)
            own_weights = model.parameters(unit) if stage else dense_weights

            def gather(gathering: Gathering, own_weights: Weights = own_weights) -> None:
                for own_call, dense_call in zip(own, dense, strict=True):
                    model.place(dense_weights)
                    with walk.present(dense_call), Products(dense_weights, gathering.expect):
                        session.pass_block(walk, unit, dense_call)
                    model.place(own_weights)
                    with walk.present(own_call), Products(own_weights, gathering.observe):
                        session.pass_block(walk, unit, own_call)
                    gathering.forget_last()

            of_stage = {matrix: fed for matrix, fed in feeds.items() if matrix[0] in names}
            known = self._known(of_stage, gather)
            model.release(unit)
            del own_weights
            self._sink.settle(unit, targets, known, stage)
            del known  # before the next stage's is gathered

    def _known(
        self, feeds: Mapping[tuple[str, int], Fed], gather: Callable[[Gathering], None]
    ) -> Known:
        """What is found of the targets that become some parameters."""
        gathering = self._gathered(feeds, self._needs, gather)

        def known(target: Target, matrix: int) -> Statistics:
            fed = feeds[target.name, matrix]
            return gathering.statistics(fed, self._blank(target, matrix))

        return known

    def _gathered(
        self,
        feeds: Mapping[tuple[str, int], Fed],
        needs: frozenset[Need],
        gather: Callable[[Gathering], None],
    ) -> Gathering:
        try:
            gathering = Gathering(set(feeds.values()), needs, self._tokens, shared=True)
            gather(gathering)
        except PartedError:
            gathering = Gathering(set(feeds.values()), needs, self._tokens, shared=False)
            gather(gathering)
        return gathering

    def _stages(
        self, walk: Walk, unit: str, call: Call, feeds: Mapping[tuple[str, int], Fed]
    ) -> Iterator[list[Target]]:
        """The targets of a part, which is loaded, in the order in which a sample comes to them.

        Those with the same inputs come together, and so do all experts' of one kind.
        """
        parameters = self._session.model.parameters(unit)

        def gather(gathering: Gathering) -> None:
            with walk.present(call), Products(parameters, gathering.observe):
                self._session.pass_block(walk, unit, call)
            gathering.forget_last()

        gathering = self._gathered(feeds, frozenset(), gather)
        order: dict[str, int] = {}
        for fed in gathering.seen():
            leader = _kind(gathering.leader(fed))
            order.setdefault(_kind(fed), order.setdefault(leader, len(order)))
        stages: dict[int, list[Target]] = {}
        for target in self._units[unit]:
            stage = order.get(_kind(feeds[target.name, 0]), len(order))
            stages.setdefault(stage, []).append(target)
        return (stages[stage] for stage in sorted(stages))


def _kind(fed: Fed) -> str:
    """A parameter's name without the numbers of experts."""
    return re.sub(r"\.\d+(?=\.)", "", fed[0])
