"""The fewest structures with which the loss on the calibration data stays within a bound.

The loss is the mean cross entropy of the samples in nats per token, of the model as it would be
written.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from emp_llm.errors import OptionError
from emp_llm.report.tensor_statistics import digits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from emp_llm.report.shrink_report import Tried
    from emp_llm.selection.mask_store import MaskStore
    from emp_llm.shrinking.choice import Choice, KindName
    from emp_llm.shrinking.measuring import Measuring

__all__ = ["fewest", "none_can_go", "search_amount", "search_number", "tried_amount"]

_MOST_NATS = 138.0
"""Nats of the largest perplexity that is reported, 1e60."""


def tried_amount(number: int | None, loss: float) -> Tried:
    """What is reported of a number of structures and the loss with it."""
    return {
        "number": number,
        "loss": digits(loss),
        "perplexity": digits(math.exp(min(loss, _MOST_NATS))),
    }


def search_amount(
    measuring: Measuring,
    amounts: Sequence[int],
    choose: Callable[[int], Choice],
    increase: float,
    others: Sequence[Choice] = (),
) -> Choice:
    """Choose as few structures as a bound on the loss allows, by bisection.

    Args:
        measuring: Measures losses.
        amounts: How many may stay in each holder, ascending; the last one is all of them.
        choose: Which ones stay, of so many.
        increase: By how many per cent the loss may rise.
        others: What is chosen of other kinds; the loss may rise from what it is with these.

    Returns:
        The choice, with what was tried.

    Raises:
        CheckpointError: As `emp_llm.shrinking.measuring.Measuring` does.
        OptionError: As there, and if none can go.
    """

    def measure(number: int | None) -> float:
        return measuring.loss([*others, *([] if number is None else [choose(number)])])

    kind = choose(amounts[-1]).kind
    number, tried = search_number(kind, amounts, measure, increase, measuring.store)
    return replace(choose(number), tried=tried)


def search_number(
    kind: KindName,
    amounts: Sequence[int],
    measure: Callable[[int | None], float],
    increase: float,
    store: MaskStore,
) -> tuple[int, tuple[Tried, ...]]:
    """Find the fewest structures that a bound on the loss allows, by bisection.

    Args:
        kind: What they are.
        amounts: How many may stay in each holder, ascending; the last one is all of them.
        measure: Returns the loss with so many; with all of them for None.
        increase: By how many per cent the loss may rise.
        store: Keeps what was measured, for the same run when it is continued.

    Returns:
        How many stay, and what was tried.

    Raises:
        OptionError: If none can go.
        OSError: If what was tried cannot be kept.
    """
    losses: dict[int | None, float] = dict(store.notes.get(f"tried {kind}", []))

    def noted(number: int | None) -> float:
        if number not in losses:
            losses[number] = measure(number)
            store.note(f"tried {kind}", [*losses.items()])
        return losses[number]

    most = noted(None) * (1 + increase / 100)
    number = fewest(amounts, noted, most)
    tried = tuple(tried_amount(*one) for one in losses.items())
    if number == amounts[-1]:
        raise none_can_go(kind, tried, increase)
    return number, tried


def none_can_go(kind: KindName, tried: Sequence[Tried], increase: float) -> OptionError:
    """What says that the bound on the loss allows nothing, and what the last trial came to."""
    whole, last = tried[0]["loss"], tried[-1]
    rise = (
        ""
        if last["number"] is None
        else (
            f": with {last['number']} it rises by {100 * (last['loss'] / whole - 1):.3g} per cent"
        )
    )
    return OptionError(
        f"{kind}: none can go if the loss on the calibration data may rise by {increase:g} per "
        f"cent{rise}: allow a larger increase"
    )


def fewest(amounts: Sequence[int], measure: Callable[[int], float], most: float) -> int:
    """The fewest structures, of those that are tried, whose loss is low enough.

    Args:
        amounts: How many may stay, ascending; the last one, with which nothing goes, is not tried.
        measure: Returns the loss with so many; it falls as more stay.
        most: The largest loss that is low enough.

    >>> tried = []
    >>> fewest(range(1, 31), lambda amount: tried.append(amount) or 30 / amount, 1.2)
    25
    >>> tried
    [15, 23, 27, 25, 24]
    """
    low, high = 0, len(amounts) - 1
    while low < high:
        middle = (low + high) // 2
        if measure(amounts[middle]) <= most:
            high = middle
        else:
            low = middle + 1
    return amounts[high]
