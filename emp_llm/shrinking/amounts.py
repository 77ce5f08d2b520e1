"""How many structures stay, and which: those with the best scores."""

from collections.abc import Mapping, Sequence
from typing import Literal

from emp_llm.errors import OptionError
from emp_llm.shrink_options import Amount
from emp_llm.shrinking.choice import Choice, Structures

__all__ = ["amounts_of", "best", "number_to_keep", "width_to_keep"]


def number_to_keep(structures: Structures, amount: Amount) -> int:
    """How many of a model's structures stay in each holder.

    Args:
        structures: Those that there are.
        amount: What was asked for; a share is rounded down to whole structures, and as many of each
            of `Structures.groups`.

    Raises:
        OptionError: If so many cannot stay.
    """
    kind, number, groups = structures.kind, structures.number, structures.groups
    has = f"the model has {number} {kind}"
    if kind != "blocks":
        has += f" in each of {len(structures.holders)} layers"
    if structures.field:
        has += f" ({structures.field})"
    if amount.keep is not None:
        keep = amount.keep
    else:
        # 1e-9: so that 30% of 10 are 3, though 0.3 × 10 may fall short of it
        share = amount.remove or 0
        removed = int(share * number + 1e-9) // groups * groups
        if not removed:
            raise OptionError(
                f"{kind}: {100 * share:.4g}% of them is less than {_least_removed(groups)}; {has}"
            )
        keep = number - removed
    if keep >= number:
        raise OptionError(f"{kind}: {keep} of them are to stay, but {has}: give a smaller number")
    if keep % groups:
        raise OptionError(
            f"{kind}: {keep} of them cannot be divided into {groups} groups of equal size "
            f"({structures.why_least}): give a multiple of {groups}; {has}"
        )
    if keep < structures.least:
        raise OptionError(
            f"{kind}: {keep} of them are too few for {structures.why_least}: keep at least "
            f"{structures.least}; {has}"
        )
    return keep


def width_to_keep(structures: Structures, amount: Amount, multiple: int) -> int:
    """How many neurons stay in each MLP: a multiple of some number, as fast kernels like widths.

    Args:
        structures: The neurons that there are.
        amount: What was asked for; with a share, the multiple next to what is left of it stays.
        multiple: The number.

    Raises:
        OptionError: If so many cannot stay.
    """
    number = structures.number
    has = f"the model has {number} in each MLP ({structures.field})"
    if amount.keep is not None:
        keep = amount.keep
        if keep % multiple:
            raise OptionError(
                f"neurons: {keep} is no multiple of {multiple}: give one, or another multiple; "
                f"{has}"
            )
    else:
        keep = round(number * (1 - (amount.remove or 0)) / multiple) * multiple
    if not 0 < keep < number:
        raise OptionError(
            f"neurons: {keep} of them would stay, by multiples of {multiple}, but {has}: give "
            "another share, or a smaller multiple"
        )
    return keep


def amounts_of(structures: Structures) -> range:
    """All numbers of structures that may stay in a holder, ascending; the last one is all.

    >>> amounts_of(Structures(kind="experts", number=8, holders=(), least=3, groups=2))
    range(4, 10, 2)
    """
    groups = structures.groups
    return range(-(-structures.least // groups) * groups, structures.number + groups, groups)


def _least_removed(groups: int) -> str:
    return "one" if groups == 1 else f"one of each of {groups} groups"


def best(
    structures: Structures,
    number: int,
    scores: Mapping[str, Sequence[float]],
    *,
    score: str,
    prefers: Literal["low", "high"],
) -> Choice:
    """The choice of the structures with the best scores; of equal ones the first.

    Args:
        structures: Those that there are.
        number: How many stay in each holder; as many of each of `Structures.groups`.
        scores: The scores of those in each holder.
        score: What the scores are called.
        prefers: Which scores are the best.
    """
    sign = 1 if prefers == "low" else -1
    size, stay = structures.number // structures.groups, number // structures.groups
    kept = {}
    for holder in structures.holders:
        ranked = [
            sorted(range(start, start + size), key=lambda i: (sign * scores[holder][i], i))[:stay]
            for start in range(0, structures.number, size)
        ]
        kept[holder] = tuple(sorted(i for group in ranked for i in group))
    return Choice(
        kind=structures.kind,
        kept=kept,
        score=score,
        scores={holder: tuple(scores[holder]) for holder in structures.holders},
    )
