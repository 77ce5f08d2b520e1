"""Scores of all experts of a checkpoint, by a criterion."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from emp_llm.shrinking.expert_criteria import BlockExperts, score_experts
from emp_llm.shrinking.expert_matrices import ExpertMatrices
from emp_llm.shrinking.routed_walk import routed_outputs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from emp_llm.calibration.session import Session
    from emp_llm.checkpoint.open_files import OpenFiles
    from emp_llm.shrinking.expert_criteria import ExpertCriterion
    from emp_llm.shrinking.plan import ShrinkPlan
    from emp_llm.shrinking.routed_outputs import RoutedOutputs

__all__ = ["expert_scores", "outputs_by_holder"]


def expert_scores(
    plan: ShrinkPlan,
    criterion: ExpertCriterion,
    files: OpenFiles,
    *,
    outputs: Mapping[str, RoutedOutputs] | None = None,
    seed: int = 0,
) -> dict[str, tuple[float, ...]]:
    """Score the experts of every block that has any; one expert is in memory at a time.

    Args:
        plan: The checkpoint and its experts.
        criterion: What scores them.
        files: The checkpoint's files.
        outputs: What the experts of each holder give on data, for a criterion that needs it.
        seed: The seed, for criteria that draw random numbers.

    Returns:
        For each holder, the scores in the order of the experts.

    Raises:
        CheckpointError: If weights cannot be read, or are not finite.
        OptionError: If the criterion fails, or returns anything but scores.
    """
    structures, matrices = plan.structures["experts"], ExpertMatrices(plan, files)
    return {
        holder: score_experts(
            criterion,
            BlockExperts(
                block=holder,
                number=structures.number,
                matrices=partial(matrices.of, holder),
                outputs=None if outputs is None else outputs[holder],
                seed=seed,
            ),
        )
        for holder in structures.holders
    }


def outputs_by_holder(plan: ShrinkPlan, session: Session) -> dict[str, RoutedOutputs]:
    """What the experts of each holder give for the samples of a calibration.

    Args:
        plan: The checkpoint and its experts.
        session: Its model and the samples.

    Raises:
        CheckpointError: If the model does not run, or its experts cannot be observed.
    """
    by_block = routed_outputs(session, plan.structures["experts"].number)
    landings = session.model.map.landings
    return {
        axis.holder: by_block[block]
        for name in plan.found.matrices
        for axis in plan.found.axes.get(name, ())
        if axis.kind == "experts" and (block := landings[name].place.block) is not None
    }
