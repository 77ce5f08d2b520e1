"""Which decoder blocks stay: by their influence, by the loss without them, or at random.

influence  those of the least influence go, all ranked once
loss       one by one, each time the one without which the loss rises the least
random     a control
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import numpy as np

from emp_llm.shrinking.amount_search import none_can_go, search_amount, tried_amount
from emp_llm.shrinking.amounts import amounts_of
from emp_llm.shrinking.block_removal import Removed, remove_next
from emp_llm.shrinking.block_walk import Blocks, measure_blocks
from emp_llm.shrinking.choice import Choice

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from emp_llm.calibration.session import Session
    from emp_llm.selection.mask_store import MaskStore
    from emp_llm.shrink_options import BlockScore
    from emp_llm.shrinking.choice import Structures
    from emp_llm.shrinking.measuring import Measuring

__all__ = ["choose_blocks", "choose_blocks_at_random"]


def choose_blocks_at_random(structures: Structures, number: int, seed: int) -> Choice:
    """Choose blocks that stay at random: those of the largest numbers that NumPy's PCG64 draws.

    Args:
        structures: The blocks.
        number: How many stay.
        seed: Of the numbers.
    """
    drawn = np.random.PCG64(seed).random_raw(structures.number)
    order = np.argsort(drawn, kind="stable").tolist()
    return _choice(structures, "random", order[: structures.number - number])


def choose_blocks(
    measuring: Measuring,
    structures: Structures,
    score: BlockScore,
    *,
    number: int | None = None,
    increase: float = 0.0,
    seed: int = 0,
    others: Sequence[Choice] = (),
) -> Choice:
    """Choose the blocks that stay, by data.

    Args:
        measuring: Runs the model on the data.
        structures: Its blocks.
        score: What they are chosen by.
        number: How many stay; None for as few as `increase` allows.
        increase: By how many per cent the loss may rise.
        seed: Of a choice at random.
        others: What is chosen of other kinds already: blocks are measured without the rest.

    Returns:
        The choice, with what was tried to find it.

    Raises:
        CheckpointError: If the model does not run or predicts no next token, or its blocks are not
            one list that tokens pass in order.
        OptionError: As `emp_llm.calibration.session.Session` does; if the bound allows none to go.
    """
    if score == "loss":
        return _by_loss(measuring, structures, number, increase, others)
    scores: tuple[float, ...] = ()
    if score == "influence":
        with measuring.session(others) as session:
            scores = tuple(_noted_blocks(session, measuring.store).influence)
    order = np.argsort(scores, kind="stable").tolist()

    def choose(amount: int) -> Choice:
        if score == "random":
            return choose_blocks_at_random(structures, amount, seed)
        return _choice(structures, score, order[: structures.number - amount], scores)

    if number is not None:
        return choose(number)
    return search_amount(measuring, amounts_of(structures), choose, increase, others)


def _by_loss(
    measuring: Measuring,
    structures: Structures,
    number: int | None,
    increase: float,
    others: Sequence[Choice],
) -> Choice:
    store = measuring.store
    with measuring.session(others) as session:
        blocks = _noted_blocks(session, store)
        removed = Removed(**store.notes.get("removed blocks", {}))
        most = math.inf if number is not None else blocks.loss * (1 + increase / 100)
        while _left(structures, removed) > (number or 1) and not _too_many(removed, most):
            removed = remove_next(session, blocks, removed)
            store.note("removed blocks", asdict(removed))
    if number is not None:  # another choice with the same store may have removed more
        removed = removed.first(structures.number - number)
    goes = removed.numbers[:-1] if _too_many(removed, most) else removed.numbers
    tried = [tried_amount(None, blocks.loss)]
    for step, (gone, loss) in enumerate(zip(removed.numbers, removed.losses, strict=True), 1):
        tried.append({**tried_amount(structures.number - step, loss), "gone": gone})
    if not goes and number is None:
        raise none_can_go("blocks", tried, increase)
    return replace(_choice(structures, "loss", goes, tuple(removed.alone)), tried=tuple(tried))


def _left(structures: Structures, removed: Removed) -> int:
    return structures.number - len(removed.numbers)


def _too_many(removed: Removed, most: float) -> bool:
    """Whether the loss is too large without the block that was removed last."""
    return bool(removed.losses) and removed.losses[-1] > most


def _noted_blocks(session: Session, store: MaskStore) -> Blocks:
    """What is measured of the blocks, here or by an earlier run."""
    noted = store.notes.get("blocks")
    if noted is not None:
        return Blocks(**noted)
    blocks = measure_blocks(session)
    store.note("blocks", asdict(blocks))
    return blocks


def _choice(
    structures: Structures, score: BlockScore, goes: Collection[int], scores: tuple[float, ...] = ()
) -> Choice:
    (holder,) = structures.holders
    stays = tuple(block for block in range(structures.number) if block not in goes)
    found = {holder: scores} if scores else {}
    return Choice(kind="blocks", kept={holder: stays}, score=score, scores=found)
