"""Which neurons and groups of heads stay, also where blocks or experts go.

With a bound on the loss, as few stay as it allows. Each number that is tried is chosen and repaired
as if it were written, for only then is the loss the one that the model would have.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from emp_llm.errors import CheckpointError
from emp_llm.selection.mask_store import MaskStore
from emp_llm.shrink_options import ShrinkOptions
from emp_llm.shrinking.amount_search import search_number
from emp_llm.shrinking.choice import Choice
from emp_llm.shrinking.narrowing import find_readers, narrowing
from emp_llm.shrinking.plan import ShrinkPlan
from emp_llm.shrinking.unwritten import unwritten

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from emp_llm.options import CalibrationOptions
    from emp_llm.report.shrink_report import Tried
    from emp_llm.runtime.progress import SharedProgress
    from emp_llm.shrinking.choice import KindName
    from emp_llm.shrinking.narrowing import Narrowing

__all__ = ["choose_widths", "score_widths"]


def choose_widths(
    plan: ShrinkPlan,
    numbers: Mapping[KindName, int | None],
    options: ShrinkOptions,
    progress: SharedProgress,
    store: MaskStore,
    *,
    others: Sequence[Choice] = (),
) -> list[Choice]:
    """Choose neurons, groups of heads, or both at once.

    Args:
        plan: The checkpoint and its structures.
        numbers: How many of each kind stay; None for as few as the bound on the loss allows, of one
            kind at most.
        options: How they are chosen.
        progress: Reports walks through the model.
        store: Takes choices and repaired weights, decoder block by decoder block, and what was
            tried.
        others: What is chosen of other kinds: what does not stay of these is left out.

    Returns:
        A choice of each kind.

    Raises:
        CheckpointError: As `emp_llm.shrinking.narrowing.narrowing` does.
        OptionError: As there, and if the bound allows none to go.
    """
    kinds = list(numbers)
    smaller, names = plan, {}
    if others:
        left = plan.with_choices(others)
        smaller = ShrinkPlan.make(plan.source, unwritten(left), kinds)
        names = {cut.name: cut.entry.name for cut in left.all_cuts}
    with narrowing(smaller, kinds, options, progress, store.folder) as narrow:
        if narrow.session is not None:
            store.note("calibration", narrow.session.samples.description())
        keep = {kind: number for kind, number in numbers.items() if number is not None}
        tried: dict[KindName, tuple[Tried, ...]] = {}
        for kind in set(kinds) - set(keep):
            amounts = _possible(smaller, kind, options.multiple)
            measure = partial(_measured, narrow, dict(keep), kind, store.folder)
            most = options.max_loss_increase or 0
            keep[kind], tried[kind] = search_number(kind, amounts, measure, most, store)
        choices = narrow.choose(keep, store).choices()
    choices = [replace(choice, tried=tried.get(choice.kind, ())) for choice in choices]
    return [_of_source(choice, plan, smaller, names) for choice in choices] if others else choices


def score_widths(
    plan: ShrinkPlan,
    kinds: Sequence[KindName],
    calibration: CalibrationOptions,
    progress: SharedProgress,
    folder: Path,
) -> list[Choice]:
    """Score neurons, groups of heads, or both in one walk, by `activation`; all of them stay.

    Args:
        plan: The checkpoint and its structures.
        kinds: Which of them; none for nothing.
        calibration: The data.
        progress: Reports the walk.
        folder: A folder for the scores; made if it is missing.

    Raises:
        CheckpointError: As `choose_widths` does.
        OptionError: As there.
    """
    if not kinds:
        return []
    keep = {kind: plan.structures[kind].number for kind in kinds}
    options = ShrinkOptions(
        neurons=keep.get("neurons"),
        kv_heads=keep.get("kv heads"),
        width_score="activation",
        repair="none",
        calibration=calibration,
    )
    with (
        MaskStore(folder) as store,
        narrowing(plan, kinds, options, progress, store.folder) as narrow,
    ):
        return narrow.choose(keep, store).choices()


def _possible(plan: ShrinkPlan, kind: KindName, multiple: int) -> list[int]:
    """How many structures of a kind may stay, ascending; the last number is all of them."""
    structures = plan.structures[kind]
    if kind == "neurons":
        return [*range(multiple, structures.number, multiple), structures.number]
    found = []
    for number in range(1, structures.number):
        kept = dict.fromkeys(structures.holders, tuple(range(number)))
        try:
            plan.with_choices([Choice(kind=kind, kept=kept)])
        except CheckpointError:  # such as heads that have to divide hidden states
            continue
        found.append(number)
    return [*found, structures.number]


def _measured(
    narrow: Narrowing,
    keep: Mapping[KindName, int],
    kind: KindName,
    folder: Path,
    number: int | None,
) -> float:
    """The loss with a number of one kind of structures; of the whole model for None.

    Args:
        narrow: Chooses structures, and measures losses.
        keep: How many stay of the other kinds.
        kind: The kind.
        folder: Where what is chosen waits meanwhile.
        number: The number.
    """
    if number is None:
        return narrow.loss()
    with TemporaryDirectory(dir=folder) as scratch, MaskStore(Path(scratch) / "tried") as masks:
        return narrow.loss(narrow.choose({**keep, kind: number}, masks).changed)


def _of_source(
    choice: Choice, plan: ShrinkPlan, smaller: ShrinkPlan, names: Mapping[str, str]
) -> Choice:
    """A choice of a smaller model by the holders of the source; in those that go, any may stay.

    Args:
        choice: The choice.
        plan: The source.
        smaller: The smaller model.
        names: The name in the source of each tensor of the smaller model.
    """
    kind = choice.kind
    holders = {reader.target.name: reader.holder for reader in find_readers(plan, [kind])}
    found = {
        reader.holder: holders[names[reader.target.name]]
        for reader in find_readers(smaller, [kind])
    }
    any_kept = dict.fromkeys(plan.structures[kind].holders, tuple(range(choice.number)))
    return replace(
        choice,
        kept=any_kept | {found[holder]: kept for holder, kept in choice.kept.items()},
        scores={found[holder]: scores for holder, scores in choice.scores.items()},
    )
