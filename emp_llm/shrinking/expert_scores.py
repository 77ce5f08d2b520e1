"""Scores of all experts of a checkpoint, by one criterion or several."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from emp_llm.shrinking.expert_criteria import BlockExperts, score_experts
from emp_llm.shrinking.expert_weights import weight_sums

if TYPE_CHECKING:
    from collections.abc import Mapping

    from emp_llm.runtime.workers import Workers
    from emp_llm.shrinking.expert_criteria import ExpertCriterion, WeightSums
    from emp_llm.shrinking.measuring import Measuring
    from emp_llm.shrinking.plan import ShrinkPlan
    from emp_llm.shrinking.routed_outputs import RoutedOutputs

__all__ = ["ExpertScores"]


class ExpertScores:
    """Scores experts by any criterion; what criteria need is gathered once.

    Args:
        plan: The checkpoint, with its experts found.
        workers: What reads weights.
        measuring: Runs the model on data; None if no criterion needs it.
    """

    def __init__(self, plan: ShrinkPlan, workers: Workers, measuring: Measuring | None) -> None:
        self._plan = plan
        self._workers = workers
        self._measuring = measuring

    def by(self, criterion: ExpertCriterion, seed: int = 0) -> dict[str, tuple[float, ...]]:
        """The scores of all experts, by the names of the decoder blocks that hold them.

        Args:
            criterion: What scores them.
            seed: The seed, for criteria that draw random numbers.

        Raises:
            CheckpointError: If weights cannot be read or are not finite, or the model does not run,
                or its experts cannot be observed.
            OptionError: If the criterion fails, or the data is too short.
        """
        structures = self._plan.structures["experts"]
        weights = self._weights if "weights" in criterion.needs else {}
        outputs = self._outputs if "outputs" in criterion.needs else {}
        return {
            holder: score_experts(
                criterion,
                BlockExperts(
                    block=holder,
                    number=structures.number,
                    seed=seed,
                    weights=weights.get(holder),
                    outputs=outputs.get(holder),
                ),
            )
            for holder in structures.holders
        }

    @cached_property
    def _weights(self) -> Mapping[str, WeightSums]:
        return weight_sums(self._plan, self._workers)

    @cached_property
    def _outputs(self) -> Mapping[str, RoutedOutputs]:
        from emp_llm.shrinking.routed_walk import outputs_by_holder

        if self._measuring is None:
            raise AssertionError("a score needs data, and there is none")
        with self._measuring.session() as session:
            return outputs_by_holder(self._plan, session)
