"""The forward walk, which most criteria use: each unit is pruned or scored when samples reach it.

A unit is a decoder block, or a module outside of decoder blocks that holds targets.

    load a unit → gather statistics of its inputs → give them to the sink → the samples go on

For a repair that restores the outputs of the dense model, every sample goes through the model in
two lanes side by side: through the pruned units and through the dense ones (as in GPTAQ, Li et al.,
arXiv 2504.02692). A unit is then processed in stages, in the order in which its targets are
multiplied: the inputs of a later target are gathered once the earlier ones are pruned and repaired,
so that no error is compensated twice.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from emp_llm.calibration.input_statistics import (
    Gathering,
    ProductObserver,
    UnsharedInputsError,
)
from emp_llm.calibration.tensor_loading import unchanged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from emp_llm.calibration.parameter_map import ParameterMatrix
    from emp_llm.calibration.sample_walk import Call, Walk
    from emp_llm.calibration.session import Session
    from emp_llm.calibration.sinks import Sink
    from emp_llm.calibration.statistics import Need, Statistics, StatisticsOf
    from emp_llm.calibration.streamed_model import Weights
    from emp_llm.tensors.target import Target

    Matrices = Mapping[tuple[str, int], ParameterMatrix]
    """By target and number of a matrix in it, the matrix of a parameter that it is loaded into."""

__all__ = ["ForwardWalk"]


class ForwardWalk:
    """One walk of all samples.

    Args:
        session: The model and its samples.
        units: The targets of each unit.
        sink: Takes the statistics of each unit's targets.
        needs: Which statistics to gather.
        without_data: Returns what is known of a matrix without data.
        paired: Whether the inputs that the dense model has are gathered as well.
    """

    def __init__(
        self,
        session: Session,
        units: Mapping[str, Sequence[Target]],
        sink: Sink,
        needs: frozenset[Need],
        without_data: StatisticsOf,
        *,
        paired: bool,
    ) -> None:
        self._session = session
        self._units = units
        self._sink = sink
        self._needs = needs
        self._without_data = without_data
        self._paired = paired
        self._tokens = session.samples.ids_NL.shape[1]
        self._changed = sink.changed if session.options.sequential else unchanged

    def run(self) -> None:
        """Give the sink the statistics of all units that samples come to and it does not have."""
        session, count = self._session, len(self._session.samples.ids_NL)
        left = {unit for unit in self._units if not self._sink.has(unit)}
        session.begin("calibrating")
        with session.walk(lanes=2 if self._paired else 1) as walk:
            for unit, calls in session.stops(walk):
                # first the lane through the pruned units, then the one through the dense units
                own, dense = calls[:count], calls[count:]
                if unit in left:
                    left.remove(unit)
                    if self._paired:
                        self._process_in_stages(walk, unit, own, dense)
                    else:
                        self._process_at_once(walk, unit, own)
                if not left:  # nobody needs to know what comes behind the last target
                    return
                for lane, change in ((own, self._changed), (dense, unchanged)):
                    if lane:
                        session.pass_on(walk, unit, lane, change)

    def _process_at_once(self, walk: Walk, unit: str, calls: Sequence[Call]) -> None:
        targets = self._units[unit]
        statistics_of = self._gather_at_once(walk, unit, calls, targets)
        # by now the unit's weights are released: they and the statistics need not fit together
        self._sink.process(unit, targets, statistics_of)

    def _gather_at_once(
        self, walk: Walk, unit: str, calls: Sequence[Call], targets: Sequence[Target]
    ) -> StatisticsOf:
        session = self._session
        session.model.load(unit, self._changed)
        matrices = session.model.matrices(unit, [target.name for target in targets])
        parameters = session.model.parameters(unit)

        def gather(gathering: Gathering) -> None:
            for call in calls:
                with walk.present(call), ProductObserver(parameters, gathering.observe):
                    session.output(walk, unit, call)
                gathering.forget_last()

        statistics_of = self._statistics_of(matrices, gather)
        session.model.release(unit)
        return statistics_of

    def _process_in_stages(
        self, walk: Walk, unit: str, own: Sequence[Call], dense: Sequence[Call]
    ) -> None:
        session, model = self._session, self._session.model
        model.load(unit, unchanged)
        matrices = model.matrices(unit, [target.name for target in self._units[unit]])
        dense_weights = model.parameters(unit)
        for stage, targets in enumerate(self._stages(walk, unit, own[0], matrices)):
            if self._sink.has(unit, stage):
                continue
            names = {target.name for target in targets}
            if stage:  # what the stages before have changed is loaded again
                model.load(unit, self._changed)
            # in the first stage nothing of this unit is pruned yet: both lanes share its weights
            own_weights = model.parameters(unit) if stage else dense_weights

            def gather(gathering: Gathering, own_weights: Weights = own_weights) -> None:
                # sample by sample in both lanes, so that the dense inputs of one sample are held
                for own_call, dense_call in zip(own, dense, strict=True):
                    model.place(dense_weights)
                    observer = ProductObserver(dense_weights, gathering.observe_dense)
                    with walk.present(dense_call), observer:
                        session.output(walk, unit, dense_call)
                    model.place(own_weights)
                    with walk.present(own_call), ProductObserver(own_weights, gathering.observe):
                        session.output(walk, unit, own_call)
                    gathering.forget_last()

            of_stage = {key: matrix for key, matrix in matrices.items() if key[0] in names}
            statistics_of = self._statistics_of(of_stage, gather)
            model.release(unit)
            del own_weights
            self._sink.process(unit, targets, statistics_of, stage)
            del statistics_of  # the Hessians of two stages need not fit together

    def _statistics_of(
        self, matrices: Matrices, gather: Callable[[Gathering], None]
    ) -> StatisticsOf:
        """The statistics of the targets that become some matrices."""
        gathering = self._gathered(matrices, self._needs, gather)

        def statistics_of(target: Target, matrix: int) -> Statistics:
            without_data = self._without_data(target, matrix)
            return gathering.statistics(matrices[target.name, matrix], without_data)

        return statistics_of

    def _gathered(
        self,
        matrices: Matrices,
        needs: frozenset[Need],
        gather: Callable[[Gathering], None],
    ) -> Gathering:
        # sharing is nearly always right, and found wrong only once samples have been run
        try:
            gathering = Gathering(set(matrices.values()), needs, self._tokens, shared=True)
            gather(gathering)
        except UnsharedInputsError:
            gathering = Gathering(set(matrices.values()), needs, self._tokens, shared=False)
            gather(gathering)
        return gathering

    def _stages(
        self, walk: Walk, unit: str, call: Call, matrices: Matrices
    ) -> Iterator[list[Target]]:
        """The targets of a unit, which is loaded, in the order in which a sample multiplies them.

        Those with the same inputs are one stage, as gate and up projections are, and so are those
        of all experts that differ only in the expert's number.
        """
        parameters = self._session.model.parameters(unit)

        def gather(gathering: Gathering) -> None:
            with walk.present(call), ProductObserver(parameters, gathering.observe):
                self._session.output(walk, unit, call)
            gathering.forget_last()

        gathering = self._gathered(matrices, frozenset(), gather)
        # one sample may not reach all experts: their place is that of others of the same kind
        order: dict[str, int] = {}
        for matrix in gathering.seen():
            leader = _kind(gathering.leader(matrix))
            order.setdefault(_kind(matrix), order.setdefault(leader, len(order)))
        stages: dict[int, list[Target]] = {}
        for target in self._units[unit]:
            stage = order.get(_kind(matrices[target.name, 0]), len(order))  # not multiplied: last
            stages.setdefault(stage, []).append(target)
        return (stages[stage] for stage in sorted(stages))


def _kind(matrix: ParameterMatrix) -> str:
    """A parameter's name without the numbers of experts."""
    return re.sub(r"\.\d+(?=\.)", "", matrix[0])
