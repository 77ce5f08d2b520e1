"""Decoder blocks removed one by one: each time the one without which the loss rises the least.

Trying all blocks each time would cost half as many passes through the model as it has blocks, for
each block that goes. How much the loss rises without a block usually grows as others go. So a block
is tried again only if its rise of an earlier time is lower than the lowest one that is known now:
accelerated greedy (Minoux, 1978), which finds what trying all of them would, as long as no rise
becomes smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
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
        rises: How much the loss rose without each of the others, when that was last tried.
        alone: How much it rose without each block of the whole model alone; empty if none has been
            removed yet.
    """

    numbers: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    rises: Mapping[int, float] = field(default_factory=dict)
    alone: tuple[float, ...] = ()


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
    rises = dict(removed.rises)
    tried = dict[int, float]()  # the loss without each
    while untried := _untried(left, rises, tried, before):
        sets = [{blocks.names[other] for other in (*removed.numbers, number)} for number in untried]
        tried |= zip(untried, losses_without(session, blocks, sets), strict=True)
        rises |= {number: tried[number] - before for number in untried}
    best = min(tried, key=lambda number: (tried[number], number))
    alone = removed.alone or tuple(rises[number] for number in left)
    del rises[best]
    return Removed(
        numbers=(*removed.numbers, best),
        losses=(*removed.losses, tried[best]),
        rises=rises,
        alone=alone,
    )


def _untried(
    left: list[int], rises: Mapping[int, float], tried: Mapping[int, float], before: float
) -> list[int]:
    """The blocks to try next: all of unknown rise, or those of an older rise below the best."""
    unknown = [number for number in left if number not in rises]
    if unknown:
        return unknown
    best = min((loss - before for loss in tried.values()), default=float("inf"))
    promising = [number for number in left if number not in tried and rises[number] < best]
    return sorted(promising, key=lambda number: (rises[number], number))[:_AT_ONCE]
