"""The fewest structures with which the loss on the calibration data stays within a bound.

The loss is the mean cross entropy of the samples in nats per token, of the model as it would be
written.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from emp_llm.report.tensor_statistics import digits

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from emp_llm.report.shrink_report import Tried
    from emp_llm.shrinking.choice import Choice
    from emp_llm.shrinking.measuring import Measuring

__all__ = ["fewest", "search_amount", "tried_amount"]

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
        OptionError: As there.
    """
    noted = f"tried {choose(amounts[-1]).kind}"
    losses: dict[int | None, float] = dict(measuring.store.notes.get(noted, []))

    def measure(number: int | None) -> float:
        if number not in losses:
            chosen = [] if number is None else [choose(number)]
            losses[number] = measuring.loss([*others, *chosen])
            measuring.store.note(noted, [*losses.items()])
        return losses[number]

    most = measure(None) * (1 + increase / 100)
    choice = choose(fewest(amounts, measure, most))
    return replace(choice, tried=tuple(tried_amount(*one) for one in losses.items()))


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
