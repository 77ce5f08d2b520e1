"""Makes a choice of each kind of structures that is to become fewer."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from emp_llm.errors import OptionError
from emp_llm.options import CalibrationOptions
from emp_llm.runtime.device_choice import check_device
from emp_llm.runtime.workers import Workers
from emp_llm.shrink_options import AUTO, ShrinkOptions, parse_amount
from emp_llm.shrinking.amounts import amounts_of, best, number_to_keep, width_to_keep
from emp_llm.shrinking.choice import WIDTHS, Choice, KindName
from emp_llm.shrinking.expert_criteria import ExpertCriterion
from emp_llm.shrinking.expert_criterion_registry import find_expert_criterion
from emp_llm.shrinking.expert_scores import ExpertScores
from emp_llm.shrinking.plan import ShrinkPlan

if TYPE_CHECKING:
    from emp_llm.shrinking.measuring import Measuring

__all__ = [
    "asked_kinds",
    "check_scores",
    "checked_criterion",
    "choose",
    "measuring_in",
    "number_of",
]


def asked_kinds(options: ShrinkOptions) -> list[KindName]:
    """The kinds of structures that are to become fewer."""
    return list(_asked(options))


def _asked(options: ShrinkOptions) -> dict[KindName, int | str]:
    """What was asked for, of each kind that is to become fewer."""
    asked: dict[KindName, int | str | None] = {
        "blocks": options.blocks,
        "experts": options.experts,
        "neurons": options.neurons,
        "kv heads": options.kv_heads,
    }
    return {kind: amount for kind, amount in asked.items() if amount is not None}


def check_scores(options: ShrinkOptions) -> None:
    """Check scores, what data are for, and the device, before the model is downloaded or read.

    A wrong name is refused even where no experts are to go.

    Raises:
        OptionError: If there is no such score, or it needs data and there is none; if there are
            data that nothing uses; or if there is no such device.
    """
    criterion = find_expert_criterion(options.score)
    if options.experts is not None:
        checked_criterion(options.score, options.calibration)
    by_data = options.experts is not None and "outputs" in criterion.needs
    text = options.calibration.text if options.calibration is not None else None
    if text is not None and not (by_data or options.uses_data):
        raise OptionError(
            f"calibration {text!r} would not be used: what is asked for is chosen without data: "
            "leave it out, or choose another score"
        )
    if options.calibration is not None:
        check_device(options.calibration.device)


def checked_criterion(score: str, data: CalibrationOptions | None) -> ExpertCriterion:
    """The criterion that a score names, before the model is downloaded or read.

    Raises:
        OptionError: If there is none, or it needs data and there is none.
    """
    criterion = find_expert_criterion(score)
    if "outputs" in criterion.needs and (data is None or data.text is None):
        raise OptionError(
            f"score {criterion.name!r} needs data: give a text to calibrate on (--calibration), or "
            "choose aimer, which needs none"
        )
    return criterion


def choose(
    plan: ShrinkPlan,
    options: ShrinkOptions,
    workers: Workers,
    store: Path,
    scorer: ExpertScores | None = None,
) -> list[Choice]:
    """Choose which structures stay, of each kind that is to become fewer.

    Args:
        plan: The checkpoint, with the structures of `asked_kinds` found.
        options: How many stay, and by what they are ranked.
        workers: What reads weights.
        store: A folder for what is measured, and for activations that exceed the memory for them.
        scorer: Scores experts, where these are chosen several times; None for a new one.

    Raises:
        CheckpointError: If a weight cannot be read or scored, or the model cannot be run on the
            data.
        OptionError: If the model cannot have so many, or the data is too short.
    """
    # checked first: what is measured takes its time
    numbers = {
        kind: None if asked == AUTO else number_of(plan, kind, asked, options.multiple)
        for kind, asked in _asked(options).items()
    }
    widths = {kind: numbers.pop(kind) for kind in WIDTHS if kind in numbers}
    calibration, choices = options.calibration, list[Choice]()
    with ExitStack() as stack:
        measuring = None
        if calibration is not None and calibration.text is not None and numbers:
            measuring = stack.enter_context(measuring_in(store, plan, calibration, workers))
        scorer = scorer or ExpertScores(plan, workers, measuring)
        chooser = _Chooser(plan, options, scorer, measuring)
        if "blocks" in numbers:
            choices.append(chooser.blocks(numbers["blocks"]))
        if "experts" in numbers:
            choices.append(chooser.experts(numbers["experts"], choices))
    if widths:
        from emp_llm.selection.mask_store import MaskStore
        from emp_llm.shrinking.width_choice import choose_widths

        with MaskStore(store) as found:
            choices += choose_widths(plan, widths, options, workers.progress, found, others=choices)
    return choices


def number_of(plan: ShrinkPlan, kind: KindName, amount: int | str, multiple: int) -> int:
    """How many structures of a kind stay.

    Args:
        plan: The checkpoint, with these structures found.
        kind: What they are.
        amount: A number, or the share that is removed.
        multiple: As in `ShrinkOptions`.

    Raises:
        OptionError: If the model cannot have so many.
    """
    structures, parsed = plan.structures[kind], parse_amount(kind, amount)
    if kind == "neurons":
        return width_to_keep(structures, parsed, multiple)
    return number_to_keep(structures, parsed)


class _Chooser:
    """Chooses blocks and experts.

    Args:
        plan: The checkpoint and its structures.
        options: What is asked for.
        scorer: Scores experts.
        measuring: Runs the model on data; None without any.
    """

    def __init__(
        self,
        plan: ShrinkPlan,
        options: ShrinkOptions,
        scorer: ExpertScores,
        measuring: "Measuring | None",
    ) -> None:
        self._plan = plan
        self._options = options
        self._scorer = scorer
        self._opened_measuring = measuring
        self._seed = options.calibration.seed if options.calibration else 0

    def blocks(self, number: int | None) -> Choice:
        """The blocks that stay; so many, or as few as the bound on the loss allows."""
        from emp_llm.shrinking.block_choice import choose_blocks, choose_blocks_at_random

        structures, score = self._plan.structures["blocks"], self._options.block_score
        if score == "random" and number is not None:
            return choose_blocks_at_random(structures, number, self._seed)
        return choose_blocks(
            self._measuring,
            structures,
            score,
            number=number,
            increase=self._options.max_loss_increase or 0,
            seed=self._seed,
        )

    def experts(self, number: int | None, others: Sequence[Choice]) -> Choice:
        """The experts that stay, where these choices have been made of other kinds."""
        structures = self._plan.structures["experts"]
        criterion = checked_criterion(self._options.score, self._options.calibration)
        scores = self._scorer.by(criterion, self._seed)

        def of_number(number: int) -> Choice:
            return best(structures, number, scores, score=criterion.name, prefers=criterion.prefers)

        if number is not None:
            return of_number(number)
        from emp_llm.shrinking.amount_search import search_amount

        most = self._options.max_loss_increase or 0
        return search_amount(self._measuring, amounts_of(structures), of_number, most, others)

    @property
    def _measuring(self) -> "Measuring":
        if self._opened_measuring is None:
            raise AssertionError("an amount or a score needs data, and there is none")
        return self._opened_measuring


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
