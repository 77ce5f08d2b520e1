"""The walk for criteria that need gradients: forward through the dense model, then backward.

A unit is a decoder block, or a module outside of decoder blocks that holds targets. Units are
scored, or pruned, on the way back; all gradients are those of the dense model.

Shapes in names: R rows (outputs) and C columns (inputs) of a matrix.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from emp_llm.calibration.backward_walk import Backward
from emp_llm.calibration.tensor_loading import unchanged

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from emp_llm.calibration.session import Session
    from emp_llm.calibration.sinks import Sink
    from emp_llm.calibration.statistics import Statistics, StatisticsOf
    from emp_llm.tensors.target import Target

__all__ = ["GradientWalk"]


class GradientWalk:
    """One walk of all samples, forward and back.

    Args:
        session: The model and its samples.
        units: The targets of each unit.
        sink: Takes the gradients of each unit's targets.
        without_data: Returns what is known of a matrix without data.
    """

    def __init__(
        self,
        session: Session,
        units: Mapping[str, Sequence[Target]],
        sink: Sink,
        without_data: StatisticsOf,
    ) -> None:
        self._session = session
        self._units = units
        self._sink = sink
        self._without_data = without_data

    def run(self) -> None:
        """Give the sink the gradients of every unit that the loss depends on."""
        session, model, sink = self._session, self._session.model, self._sink
        session.begin("calibrating", 2)
        with session.walk(gradients=True) as walk:
            backward = Backward(model, walk.activations, session.explaining)
            for unit, calls in session.stops(walk):
                model.load(unit, unchanged)
                backward.record(walk, unit, calls, session.output)
                model.release(unit)
            for unit, sums in backward.gradients(
                self._target_parameters, walk.own_forward, session.passed
            ):
                targets = self._units.get(unit, ())
                gradients = model.map.to_checkpoint(sums, [target.name for target in targets])
                if targets and not sink.has(unit):
                    sink.process(unit, targets, self._statistics_of(gradients))
                # they are as large as the weights in float32: gone before the next unit's are made
                gradients.clear()
                sums.clear()

    def _target_parameters(self, unit: str) -> set[str]:
        """The parameters of a unit that its targets become."""
        targets = [target.name for target in self._units.get(unit, ())]
        parts = self._session.model.matrices(unit, targets).values()
        return {name for matrices in parts for name, _ in matrices}

    def _statistics_of(self, gradients: Mapping[str, torch.Tensor]) -> StatisticsOf:
        samples, tokens = self._session.samples.ids_NL.shape
        scale = samples * self._session.gradient_scale  # of a mean, and as the loss was scaled

        def statistics_of(target: Target, matrix: int) -> Statistics:
            geometry = target.geometry
            stored = gradients[target.name].reshape(geometry.matrices, *geometry.shape[-2:])[matrix]
            sums_RC = stored.T if geometry.transposed else stored
            return replace(
                self._without_data(target, matrix),
                tokens=samples * tokens if sums_RC.any() else 0,
                gradient_RC=sums_RC.contiguous() / scale,
            )

        return statistics_of
