"""Which neurons and groups of heads stay, also where blocks or experts go.

With a bound on the loss, as few stay as it allows. Each number that is tried is chosen and repaired
as if it were written, for only then is the loss the one that the model would have.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from emp_llm.errors import CheckpointError
from emp_llm.selection.mask_store import MaskStore
from emp_llm.shrinking.amount_search import fewest, tried_amount
from emp_llm.shrinking.choice import Choice
from emp_llm.shrinking.narrowing import find_readers, narrowing
from emp_llm.shrinking.plan import ShrinkPlan
from emp_llm.shrinking.unwritten import unwritten

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from emp_llm.report.shrink_report import Tried
    from emp_llm.runtime.progress import SharedProgress
    from emp_llm.shrink_options import ShrinkOptions
    from emp_llm.shrinking.choice import KindName
    from emp_llm.shrinking.narrowing import Narrowing

__all__ = ["choose_widths"]


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
        OptionError: As there.
    """
    kinds = list(numbers)
    smaller, names = plan, {}
    if others:
        left = plan.with_choices(others)
        smaller = ShrinkPlan.make(plan.source, unwritten(left), kinds)
        names = {cut.name: cut.entry.name for cut in left.all_cuts}
    with narrowing(smaller, kinds, options, progress, store.folder) as narrow:
        keep = {kind: number for kind, number in numbers.items() if number is not None}
        tried: dict[KindName, tuple[Tried, ...]] = {}
        for kind in set(kinds) - set(keep):
            amounts = _possible(smaller, kind, options.multiple)
            search = _Search(narrow, keep, kind, store)
            keep[kind] = search.fewest(amounts, options.max_loss_increase or 0)
            tried[kind] = tuple(tried_amount(*one) for one in search.losses.items())
        choices = narrow.choose(keep, store).choices()
    choices = [replace(choice, tried=tried.get(choice.kind, ())) for choice in choices]
    return [_of_source(choice, plan, smaller, names) for choice in choices] if others else choices


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


class _Search:
    """Measures losses with several numbers of one kind of structures.

    Args:
        narrow: Chooses structures, and measures losses.
        keep: How many stay of the other kinds.
        kind: The kind.
        store: Keeps what was tried, for the same run when it is continued.

    Attributes:
        losses: What was tried, nats per token by number; None is the number of all.
    """

    def __init__(
        self, narrow: Narrowing, keep: Mapping[KindName, int], kind: KindName, store: MaskStore
    ) -> None:
        self._narrow = narrow
        self._keep = dict(keep)
        self._kind = kind
        self._store = store
        self._note = f"tried {kind}"
        self.losses: dict[int | None, float] = dict(store.notes.get(self._note, []))

    def fewest(self, amounts: Sequence[int], increase: float) -> int:
        """The fewest structures with which the loss rises by no more than so many per cent."""
        return fewest(amounts, self._loss, self._loss(None) * (1 + increase / 100))

    def _loss(self, number: int | None) -> float:
        if number not in self.losses:
            self.losses[number] = self._measured(number)
            self._store.note(self._note, [*self.losses.items()])
        return self.losses[number]

    def _measured(self, number: int | None) -> float:
        if number is None:
            return self._narrow.loss()
        with (
            TemporaryDirectory(dir=self._store.folder) as scratch,
            MaskStore(Path(scratch) / "tried") as masks,
        ):
            sink = self._narrow.choose({**self._keep, self._kind: number}, masks)
            return self._narrow.loss(sink.changed)


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
