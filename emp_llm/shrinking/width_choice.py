"""Which neurons and groups of heads stay, also where blocks or experts go."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from emp_llm.shrinking.narrowing import find_readers, narrowing
from emp_llm.shrinking.plan import ShrinkPlan
from emp_llm.shrinking.unwritten import unwritten

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from emp_llm.runtime.progress import SharedProgress
    from emp_llm.selection.mask_store import MaskStore
    from emp_llm.shrink_options import ShrinkOptions
    from emp_llm.shrinking.choice import Choice, KindName

__all__ = ["choose_widths"]


def choose_widths(
    plan: ShrinkPlan,
    keep: Mapping[KindName, int],
    options: ShrinkOptions,
    progress: SharedProgress,
    store: MaskStore,
    *,
    others: Sequence[Choice] = (),
) -> list[Choice]:
    """Choose neurons, groups of heads, or both at once.

    Args:
        plan: The checkpoint and its structures.
        keep: How many of each kind stay.
        options: How they are chosen.
        progress: Reports walks through the model.
        store: Takes choices and repaired weights, decoder block by decoder block.
        others: What is chosen of other kinds: what does not stay of these is left out.

    Returns:
        A choice of each kind.

    Raises:
        CheckpointError: As `emp_llm.shrinking.narrowing.narrowing` does.
        OptionError: As there.
    """
    kinds = list(keep)
    smaller, names = plan, {}
    if others:
        left = plan.with_choices(others)
        smaller = ShrinkPlan.make(plan.source, unwritten(left), kinds)
        names = {cut.name: cut.entry.name for cut in left.all_cuts}
    with narrowing(smaller, kinds, options, progress, store.folder) as narrow:
        choices = narrow.choose(keep, store).choices()
    return [_of_source(choice, plan, smaller, names) for choice in choices] if others else choices


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
