"""What each decoder block does on data: its influence, and the loss of the model without it.

Both are measured with one decoder block in memory at a time. A model without a block is the one in
which the block is *bypassed*: what comes in goes out as it is.

Shapes in names: T tokens, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cosine_similarity

from emp_llm.calibration.lanes import batched, pass_alike
from emp_llm.calibration.tensor_loading import unchanged
from emp_llm.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from emp_llm.calibration.sample_walk import Call, Walk
    from emp_llm.calibration.session import Session

__all__ = ["Blocks", "losses_without", "measure_blocks"]

_THREADS = 1024
"""Samples, of all models that are run side by side, which go through a walk at once."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """The decoder blocks of a model.

    Attributes:
        names: Their names in the model, in the order in which tokens pass them.
        influence: Of each, 1 - the cosine of a token's hidden state before and after it, the mean
            over all tokens; between 0 (it changes no direction) and 2.
        extras: Of each, how many values it returns beside hidden states, in a tuple; None if it
            returns hidden states alone.
        loss: The loss of the whole model, nats per token.
    """

    names: Sequence[str]
    influence: Sequence[float]
    extras: Sequence[int | None]
    loss: float


def measure_blocks(session: Session) -> Blocks:
    """Find the decoder blocks that tokens pass, and the influence of each.

    Block influence is ShortGPT's (Men et al., arXiv 2403.03853).

    Args:
        session: The model and its samples.

    Raises:
        CheckpointError: If the model does not run or predicts no next token, or its blocks are not
            one list that tokens pass in order.
    """
    influence, extras = dict[str, float](), list[int | None]()
    session.begin("measuring the influence of blocks")
    with session.walk(loss=True) as walk:
        for unit, calls in session.stops(walk):
            if unit in influence:
                raise _not_one_list(session, f"tokens pass {unit!r} several times")
            session.model.load(unit, unchanged)
            passages = [_pass_with_influence(session, walk, unit, call) for call in calls]
            session.model.release(unit)
            influence[unit] = math.fsum(found for found, _ in passages) / len(passages)
            extras.append(passages[0][1])
        loss = _sum(walk.results())
    if len(lists := {name.rpartition(".")[0] for name in influence}) != 1:
        found = ", ".join(map(repr, sorted(lists))) or "none"
        raise _not_one_list(session, f"its lists of blocks are {found}")
    return Blocks(
        names=tuple(influence),
        influence=tuple(influence.values()),
        extras=tuple(extras),
        loss=loss,
    )


def losses_without(
    session: Session, blocks: Blocks, removals: Sequence[Collection[str]]
) -> list[float]:
    """The losses of models that lack some decoder blocks.

    All of them go through one walk, side by side. As long as the same blocks were bypassed, their
    activations are equal and computed once.

    Args:
        session: The model and its samples.
        blocks: Its decoder blocks.
        removals: Of each model, the names of the blocks that it lacks.

    Returns:
        Of each, nats per token.

    Raises:
        CheckpointError: If one of them does not run, or gives NaN or infinity.
        OSError: If activations cannot be written.
    """
    at_once = max(1, _THREADS // len(session.samples.ids_NL))
    session.begin("measuring the loss without blocks", math.ceil(len(removals) / at_once))
    return [
        loss
        for some in batched(removals, at_once)
        for loss in _losses_at_once(session, blocks, [frozenset(removed) for removed in some])
    ]


def _losses_at_once(
    session: Session, blocks: Blocks, removals: Sequence[frozenset[str]]
) -> list[float]:
    count, passed = len(session.samples.ids_NL), set[str]()
    extras = dict(zip(blocks.names, blocks.extras, strict=True))
    with session.walk(lanes=len(removals), loss=True) as walk:
        for unit, calls in session.stops(walk):
            alike: dict[frozenset[str], list[Sequence[Call]]] = {}
            for removed, lane in zip(removals, batched(calls, count), strict=True):
                if unit in removed:
                    _bypass(walk, unit, lane, extras[unit])
                else:
                    alike.setdefault(removed & passed, []).append(lane)
            passed.add(unit)
            if alike:
                session.model.load(unit, unchanged)
                for lanes in alike.values():
                    pass_alike(session, walk, unit, lanes)
                session.model.release(unit)
        return [_sum(part) for part in batched(walk.results(), count)]


def _pass_with_influence(
    session: Session, walk: Walk, unit: str, call: Call
) -> tuple[float, int | None]:
    """Let a sample pass a block; returns the block's influence on it, and its extras."""
    with walk.present(call):
        before = _hidden_states(unit, call).clone()  # a block may write to it
        output = session.output(walk, unit, call)
        after, extras = (
            (output[0], len(output) - 1) if isinstance(output, tuple) else (output, None)
        )
        if not isinstance(after, torch.Tensor) or after.shape != before.shape:
            raise _unlike(unit)
        cosine = cosine_similarity(before.double(), after.double(), dim=-1).mean().item()
        walk.pass_on(call, output)
        return 1 - cosine, extras


def _bypass(walk: Walk, unit: str, lane: Sequence[Call], extras: int | None) -> None:
    """Let samples go on with what they came with."""
    for call in lane:
        with walk.present(call):
            hidden = _hidden_states(unit, call)
            walk.pass_on(call, hidden if extras is None else (hidden, *[None] * extras))


def _hidden_states(unit: str, call: Call) -> torch.Tensor:
    """What passes through a block, of those things that it is called with."""
    found = call.args[0] if call.args else call.kwargs.get("hidden_states")
    if not isinstance(found, torch.Tensor):
        raise _unlike(unit)
    return found


def _unlike(unit: str) -> CheckpointError:
    return CheckpointError(
        f"{unit}: does not return hidden states of the shape that it is given, so that no other "
        "block can take its place: keep all blocks"
    )


def _not_one_list(session: Session, found: str) -> CheckpointError:
    return CheckpointError(
        f"{type(session.model.model).__name__}: {found}, and blocks are chosen from one list that "
        "tokens pass in order: keep all blocks"
    )


def _sum(shares: Iterable[object]) -> float:
    """The mean loss of all samples, of the shares that each has in it."""
    return math.fsum(share for share in shares if isinstance(share, float))
