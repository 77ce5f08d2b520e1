"""Makes a choice of each kind of structures that is to become fewer."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from emp_llm.errors import OptionError
from emp_llm.options import CalibrationOptions
from emp_llm.runtime.workers import Workers
from emp_llm.shrink_options import ShrinkOptions, parse_amount
from emp_llm.shrinking.amounts import best, number_to_keep, width_to_keep
from emp_llm.shrinking.choice import Choice, KindName
from emp_llm.shrinking.expert_criteria import ExpertCriterion
from emp_llm.shrinking.expert_criterion_registry import find_expert_criterion
from emp_llm.shrinking.expert_scores import ExpertScores
from emp_llm.shrinking.plan import ShrinkPlan

if TYPE_CHECKING:
    from emp_llm.shrinking.measuring import Measuring

__all__ = ["asked_kinds", "checked_criterion", "choose", "measuring_in"]


def asked_kinds(options: ShrinkOptions) -> list[KindName]:
    """The kinds of structures that are to become fewer."""
    asked: dict[KindName, int | str | None] = {
        "experts": options.experts,
        "neurons": options.neurons,
        "kv heads": options.kv_heads,
    }
    return [kind for kind, amount in asked.items() if amount is not None]


def checked_criterion(score: str, data: CalibrationOptions | None) -> ExpertCriterion:
    """The criterion that a score names, before the model is downloaded or read.

    Raises:
        OptionError: If there is none, or it needs data and there is none.
    """
    criterion = find_expert_criterion(score)
    if "outputs" in criterion.needs and (data is None or data.text is None):
        raise OptionError(
            f"score {criterion.name!r} needs data: give a text to calibrate on, or choose aimer, "
            "which needs none"
        )
    return criterion


def choose(plan: ShrinkPlan, options: ShrinkOptions, workers: Workers, store: Path) -> list[Choice]:
    """Choose which structures stay, of each kind that is to become fewer.

    Args:
        plan: The checkpoint, with the structures of `asked_kinds` found.
        options: How many stay, and by what they are ranked.
        workers: What reads weights.
        store: A folder for what is measured, and for activations that exceed the memory for them.

    Raises:
        CheckpointError: If a weight cannot be read or scored, or the model cannot be run on the
            data.
        OptionError: If the model cannot have so many, or the data is too short.
    """
    choices = []
    widths = _widths(plan, options)  # checked first: what is measured takes its time
    if options.experts is not None:
        structures = plan.structures["experts"]
        number = number_to_keep(structures, parse_amount("experts", options.experts))
        criterion = checked_criterion(options.score, options.calibration)
        seed = options.calibration.seed if options.calibration else 0
        with ExitStack() as stack:
            measuring = None
            if "outputs" in criterion.needs and options.calibration is not None:
                measuring = stack.enter_context(
                    measuring_in(store, plan, options.calibration, workers)
                )
            scores = ExpertScores(plan, workers, measuring, seed).by(criterion)
        choices.append(
            best(structures, number, scores, score=criterion.name, prefers=criterion.prefers)
        )
    if widths:
        from emp_llm.selection.mask_store import MaskStore
        from emp_llm.shrinking.width_choice import choose_widths

        with MaskStore(store) as found:
            choices += choose_widths(plan, widths, options, workers.progress, found, others=choices)
    return choices


def _widths(plan: ShrinkPlan, options: ShrinkOptions) -> dict[KindName, int]:
    """How many neurons and key-value heads stay, of each kind that is to become fewer."""
    numbers: dict[KindName, int] = {}
    if options.neurons is not None:
        amount = parse_amount("neurons", options.neurons)
        numbers["neurons"] = width_to_keep(plan.structures["neurons"], amount, options.multiple)
    if options.kv_heads is not None:
        amount = parse_amount("kv_heads", options.kv_heads)
        numbers["kv heads"] = number_to_keep(plan.structures["kv heads"], amount)
    return numbers


@contextmanager
def measuring_in(
    folder: Path, plan: ShrinkPlan, calibration: CalibrationOptions, workers: Workers
) -> Iterator["Measuring"]:
    """What runs the model on data. torch is imported for it, and not before.

    Args:
        folder: Where it keeps what is measured; made if it is missing.
        plan: The model.
        calibration: The data.
        workers: Their progress is reported to.
    """
    from emp_llm.selection.mask_store import MaskStore
    from emp_llm.shrinking.measuring import Measuring

    with MaskStore(folder) as store:
        yield Measuring(plan, calibration, workers.progress, store)
