"""Makes a choice of each kind of structures that is to become fewer."""

from emp_llm.runtime.workers import Workers
from emp_llm.shrink_options import ShrinkOptions, parse_amount
from emp_llm.shrinking.amounts import best, number_to_keep
from emp_llm.shrinking.choice import Choice, KindName
from emp_llm.shrinking.expert_weights import aimer_scores
from emp_llm.shrinking.plan import ShrinkPlan

__all__ = ["asked_kinds", "choose"]


def asked_kinds(options: ShrinkOptions) -> list[KindName]:
    """The kinds of structures that are to become fewer."""
    return ["experts"] if options.experts is not None else []


def choose(plan: ShrinkPlan, options: ShrinkOptions, workers: Workers) -> list[Choice]:
    """Choose which structures stay, of each kind that is to become fewer.

    Args:
        plan: The checkpoint, with the structures of `asked_kinds` found.
        options: How many stay, and by what they are ranked.
        workers: What reads weights.

    Raises:
        CheckpointError: If a weight cannot be read or scored.
        OptionError: If the model cannot have so many.
    """
    choices = []
    if options.experts is not None:
        structures = plan.structures["experts"]
        number = number_to_keep(structures, parse_amount("experts", options.experts))
        scores = aimer_scores(plan, workers)
        choices.append(best(structures, number, scores, score="aimer", prefers="low"))
    return choices
