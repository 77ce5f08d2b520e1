"""The forward walk, which most criteria use: each unit is pruned or scored when samples reach it.

A unit is a decoder block, or a module outside of decoder blocks that holds targets.

    load a unit → gather statistics of its inputs → give them to the sink → the samples go on

For a repair that restores the outputs of the dense model, samples go through the model in two lanes
side by side: all through the pruned units, and half of them through the dense ones (as in GPTAQ,
Li et al., arXiv 2504.02692, where all do). A unit is then processed in stages, in the order in
which its targets are multiplied: the inputs of a later target are gathered once the earlier ones
are pruned and repaired, so that no error is compensated twice.

Statistics take no whole pass through a unit: a sample ends where it has come to the last product
that is to be observed. On the last stage the dense lane goes on at once.

Samples may come to a unit several times, and a unit may borrow the weights of another one, to which
they are tied. The weights are processed at their last use, with the statistics of all uses, and are
dense until then; there are no stages, for which all uses would have to be repeated.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from emp_llm.calibration.input_statistics import (
    AllObservedError,
    Gathering,
    ProductObserver,
    UnsharedInputsError,
    UntilAllObserved,
)
from emp_llm.calibration.remembered import Remembered
from emp_llm.calibration.tensor_loading import unchanged

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    import torch

    from emp_llm.calibration.parameter_map import ParameterMatrix
    from emp_llm.calibration.remembered import Observe
    from emp_llm.calibration.sample_walk import Call, Walk
    from emp_llm.calibration.session import Session
    from emp_llm.calibration.sinks import Sink
    from emp_llm.calibration.statistics import Need, Statistics, StatisticsOf
    from emp_llm.calibration.streamed_model import Weights
    from emp_llm.tensors.target import Target

    Matrices = Mapping[tuple[str, int], ParameterMatrix]
    """By target and number of a matrix in it, the matrix of a parameter that it is loaded into."""

__all__ = ["ForwardWalk"]


@dataclass
class _Lanes:
    """All samples at a unit.

    Attributes:
        walk: Their walk.
        unit: The unit.
        own: Their calls on the way through the pruned units.
        dense: The calls of the first samples on the way through the dense units, if some go through
            these as well; without those that have gone on.
        ends: Whether the walk ends here, so that no sample has to go on.
        remembered: What the unit's parts before its targets gave for each call.
        gone: Whether some of the dense lane have gone on.
    """

    walk: Walk
    unit: str
    own: Sequence[Call]
    dense: list[Call]
    ends: bool
    remembered: Remembered
    gone: bool = False


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
        self._later: frozenset[str] = frozenset()
        self._collected: dict[str, Gathering] = {}

    def run(self) -> None:
        """Give the sink the statistics of all units that samples come to and it does not have."""
        session, count = self._session, len(self._session.samples.ids_NL)
        left = {unit for unit in self._units if not self._sink.has(unit)}
        session.begin("calibrating")  # first: finding the visits reads the whole model
        uses = [session.model.multiplied_units(unit) for unit in session.visits]
        # samples are drawn at random, so that the first half is as good as any
        with session.walk(more=(count + 1) // 2 if self._paired else 0) as walk:
            for visit, (unit, calls) in enumerate(session.stops(walk)):
                self._later = frozenset(one for used in uses[visit + 1 :] for one in used)
                # first the lane through the pruned units, then the one through the dense units
                ends = not left & self._later
                with self._remembered(walk, unit, left) as remembered:
                    lanes = _Lanes(walk, unit, calls[:count], calls[count:], ends, remembered)
                    for used in session.model.multiplied_units(unit):
                        if used in left:
                            self._use(lanes, used)
                    left &= self._later
                    if ends:  # nobody needs to know what comes behind the last target
                        return
                    remembered.changing = frozenset()
                    for lane, change in ((lanes.own, self._changed), (lanes.dense, unchanged)):
                        if lane:
                            session.pass_on(walk, unit, lane, change, remembered)

    def _remembered(self, walk: Walk, unit: str, left: Collection[str]) -> Remembered:
        """What parts of a unit give for each call."""
        model, activations = self._session.model, walk.activations
        # weights that a unit borrows may change while it is here, whatever part they are in
        if unit not in left or len(model.multiplied_units(unit)) > 1:
            return Remembered(unit, model.module(unit), (), activations, 0)
        names = {matrix[0] for matrix in self._matrices(unit).values()}
        return Remembered(unit, model.module(unit), names, activations, activations.room)

    def _changed(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the checkpoint as it is loaded for the lane through the pruned units.

        A unit that is used again later stays dense until then, even if an earlier run has pruned
        it: every run gives the same statistics.
        """
        if not self._session.options.sequential or self._session.model.unit_of(name) in self._later:
            return tensor
        return self._sink.changed(name, tensor)

    def _use(self, lanes: _Lanes, unit: str) -> None:
        """Gather statistics of the targets of a unit, and process it if this is its last use."""
        if unit in self._later or unit in self._collected or unit != lanes.unit:
            self._collect(lanes, unit)
        elif self._paired:
            self._process_in_stages(lanes, unit)
        else:
            self._process_at_once(lanes, unit)

    def _collect(self, lanes: _Lanes, unit: str) -> None:
        """Gather statistics at one of several uses of a unit, and process it at the last one.

        A unit that borrows its weights uses it as well.
        """
        activations, matrices = lanes.walk.activations, self._matrices(unit)
        gathering = self._collected.pop(unit, None)
        if gathering is None:
            # other inputs may be multiplied at the next use, so that matrices share no statistics
            gathering = Gathering(set(matrices.values()), self._needs, self._tokens, shared=False)
        else:
            activations.bring_back(gathering)
        self._loaded(lanes)(gathering)
        self._session.model.release(lanes.unit)
        if unit in self._later:
            activations.put_away(gathering, gathering.tensors())
            self._collected[unit] = gathering
        else:
            self._sink.process(unit, self._units[unit], self._statistics_of(matrices, gathering))

    def _loaded(self, lanes: _Lanes) -> Callable[[Gathering], None]:
        """Load a unit, and return what gathers statistics at it."""
        model, unit = self._session.model, lanes.unit
        if not self._paired:
            model.load(unit, self._changed)
            return partial(self._gather, lanes)
        model.load(unit, unchanged)
        dense_weights = model.parameters(unit)
        model.release(unit)
        model.load(unit, self._changed)
        return partial(self._gather_both, lanes, dense_weights, model.parameters(unit))

    def _process_at_once(self, lanes: _Lanes, unit: str) -> None:
        matrices = self._matrices(unit)
        gathering = self._gathered(matrices, self._needs, self._loaded(lanes))
        # the unit's weights are released: they and the statistics need not fit together
        self._session.model.release(unit)
        self._sink.process(unit, self._units[unit], self._statistics_of(matrices, gathering))

    def _process_in_stages(self, lanes: _Lanes, unit: str) -> None:
        model = self._session.model
        model.load(unit, unchanged)
        matrices = self._matrices(unit)
        dense_weights = model.parameters(unit)
        # in the first stage nothing of this unit is pruned yet, but what it borrows may be
        borrows = len(model.multiplied_units(unit)) > 1
        stages = self._stages(lanes, unit, matrices)
        for stage, targets in enumerate(stages):
            if self._sink.has(unit, stage):
                continue
            own_weights = dense_weights
            if stage or borrows:  # what the stages before have changed is loaded again
                model.release(unit)
                model.load(unit, self._changed)
                own_weights = model.parameters(unit)
            passing = stage == len(stages) - 1 and not lanes.ends
            gather = partial(self._gather_both, lanes, dense_weights, own_weights, passing=passing)
            names = {target.name for target in targets}
            of_stage = {key: matrix for key, matrix in matrices.items() if key[0] in names}
            left = {target.name for one in stages[stage:] for target in one}
            lanes.remembered.changing = frozenset(
                matrix[0] for key, matrix in matrices.items() if key[0] in left
            )
            gathering = self._gathered(of_stage, self._needs, gather)
            model.release(unit)
            del own_weights, gather
            self._sink.process(unit, targets, self._statistics_of(of_stage, gathering), stage)
            del gathering  # the Hessians of two stages need not fit together

    def _gather(self, lanes: _Lanes, gathering: Gathering) -> None:
        """Gather statistics at a unit, which is loaded."""
        gathering.begin()
        self._gather_from(lanes, lanes.own, gathering)

    def _gather_from(self, lanes: _Lanes, calls: Sequence[Call], gathering: Gathering) -> None:
        """Gather statistics of some samples."""
        for call in calls:
            with lanes.walk.present(call):
                self._observe(lanes, call, gathering.observe, gathering)
                gathering.forget_last()

    def _gather_both(
        self,
        lanes: _Lanes,
        dense_weights: Weights,
        own_weights: Weights,
        gathering: Gathering,
        *,
        passing: bool = False,
    ) -> None:
        """Gather statistics at a unit, for which these weights are loaded, in both lanes.

        With `passing`, the dense lane goes on to the next unit.
        """
        model = self._session.model
        if lanes.gone:  # a second try
            model.place(own_weights)
            self._gather(lanes, gathering)
            return
        gathering.begin()
        # sample by sample in both lanes, so that the dense inputs of one sample are held
        dense_calls = tuple(lanes.dense)
        paired = len(dense_calls)
        for own_call, dense_call in zip(lanes.own[:paired], dense_calls, strict=True):
            # the activations of both: what a matrix is multiplied by may be what the unit was given
            with lanes.walk.present(dense_call), lanes.walk.present(own_call):
                model.place(dense_weights)
                if passing:
                    lanes.dense.remove(dense_call)
                    lanes.gone = True
                    self._pass_on(lanes, dense_call, gathering.observe_dense)
                else:
                    self._observe(lanes, dense_call, gathering.observe_dense, gathering)
                model.place(own_weights)
                self._observe(lanes, own_call, gathering.observe, gathering)
                gathering.forget_last()
        self._gather_from(lanes, lanes.own[paired:], gathering)

    def _observe(self, lanes: _Lanes, call: Call, observe: Observe, gathering: Gathering) -> None:
        """Run a unit on a sample, as far as there is something to observe.

        The unit is loaded, and the sample's activations are in memory.
        """
        observe = lanes.remembered.observing(observe)
        until = UntilAllObserved(observe, gathering)
        weights = self._session.model.multiplied(lanes.unit)
        try:
            with lanes.remembered.run(call), ProductObserver(weights, until, until.needs):
                self._session.output(lanes.walk, lanes.unit, call)
        except AllObservedError:
            self._session.check_finite(lanes.unit, call, until.last)

    def _pass_on(self, lanes: _Lanes, call: Call, observe: Observe) -> None:
        """Run a unit in the same way to its end, and let the sample go on with the output."""
        observe = lanes.remembered.observing(observe)
        weights = self._session.model.multiplied(lanes.unit)
        with lanes.remembered.run(call, last=True), ProductObserver(weights, observe):
            output = self._session.output(lanes.walk, lanes.unit, call)
        lanes.walk.pass_on(call, output)

    def _matrices(self, unit: str) -> Matrices:
        names = [target.name for target in self._units[unit]]
        # the parts that loading splits a tensor into have the same inputs: the first one's count
        found = self._session.model.matrices(unit, names)
        return {key: matrices[0] for key, matrices in found.items()}

    def _statistics_of(self, matrices: Matrices, gathering: Gathering) -> StatisticsOf:
        """The statistics of the targets that become some matrices."""

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

    def _stages(self, lanes: _Lanes, unit: str, matrices: Matrices) -> list[list[Target]]:
        """The targets of a unit, which is loaded, in the order in which a sample multiplies them.

        Those with the same inputs are one stage, as gate and up projections are, and so are those
        of all experts that differ only in the expert's number.
        """

        def gather(gathering: Gathering) -> None:
            with lanes.walk.present(lanes.own[0]):
                self._observe(lanes, lanes.own[0], gathering.observe, gathering)
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
        return [stages[stage] for stage in sorted(stages)]


def _kind(matrix: ParameterMatrix) -> str:
    """A parameter's name without the numbers of experts."""
    return re.sub(r"\.\d+(?=\.)", "", matrix[0])
