"""Decoder blocks removed one by one: each time the one without which the loss rises the least.

Trying all blocks each time would cost half as many passes through the model as it has blocks, for
each block that goes. How much the loss rises without a block usually grows as others go. So a block
is tried again only if its rise of an earlier time is lower than the lowest one that is known now:
accelerated greedy (Minoux, 1978), which finds what trying all of them would, as long as no rise
becomes smaller.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from emp_llm.shrinking.block_walk import losses_without

if TYPE_CHECKING:
    from emp_llm.calibration.session import Session
    from emp_llm.shrinking.block_walk import Blocks

__all__ = ["Removed", "remove_next"]

_AT_ONCE = 4
"""Blocks that are tried side by side, once a rise is known of each."""


@dataclass(frozen=True, kw_only=True)
class Removed:
    """The blocks that are removed so far; all numbers count from 0 in the order of the model.

    Attributes:
        numbers: Their numbers, in the order in which they went.
        losses: The loss once each had gone, nats per token.
        rises: By how much the loss rose without each block when that was last tried; empty if none
            has been.
        alone: By how much it rose without each block of the whole model; empty if that has not been
            tried.
    """

    numbers: Sequence[int] = ()
    losses: Sequence[float] = ()
    rises: Sequence[float] = ()
    alone: Sequence[float] = ()

    def first(self, count: int) -> Removed:
        """The first of them alone; all if there are no more."""
        return replace(self, numbers=self.numbers[:count], losses=self.losses[:count])


def remove_next(session: Session, blocks: Blocks, removed: Removed) -> Removed:
    """Remove the block without which the loss rises the least.

    Args:
        session: The model and its samples.
        blocks: All of its blocks.
        removed: Those that are removed already; one at least must be left.

    Raises:
        CheckpointError: As `emp_llm.shrinking.block_walk.losses_without` does.
        OSError: As there.
    """
    before = removed.losses[-1] if removed.losses else blocks.loss
    left = [number for number in range(len(blocks.names)) if number not in removed.numbers]
    rises = [*(removed.rises or [-math.inf] * len(blocks.names))]
    tried = dict[int, float]()  # the loss without each
    while untried := _untried(left, rises, tried):
        sets = [{blocks.names[other] for other in (*removed.numbers, number)} for number in untried]
        for number, loss in zip(untried, losses_without(session, blocks, sets), strict=True):
            tried[number], rises[number] = loss, loss - before
    best = min(tried, key=lambda number: (tried[number], number))
    return Removed(
        numbers=(*removed.numbers, best),
        losses=(*removed.losses, tried[best]),
        rises=rises,
        alone=removed.alone or rises,
    )


def _untried(left: Sequence[int], rises: Sequence[float], tried: Collection[int]) -> list[int]:
    """The blocks to try next: all that never were, or else some whose rise may be the lowest."""
    never = [number for number in left if rises[number] == -math.inf]
    if never:
        return never
    best = min((rises[number] for number in tried), default=math.inf)
    promising = [number for number in left if number not in tried and rises[number] < best]
    return sorted(promising, key=lambda number: (rises[number], number))[:_AT_ONCE]
