"""Lanes: each sample goes through a model several times, side by side, as through several models.

As long as lanes are alike, what a unit gives one of them is what it gives all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import torch
from torch.utils import _pytree

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emp_llm.calibration.sample_walk import Call, Walk
    from emp_llm.calibration.session import Session

__all__ = ["batched", "pass_alike"]

_Value = TypeVar("_Value")


def batched(values: Sequence[_Value], size: int) -> list[Sequence[_Value]]:
    """Values, such as the calls of all lanes, in groups of this size; the last may be smaller."""
    return [values[start : start + size] for start in range(0, len(values), size)]


def pass_alike(session: Session, walk: Walk, unit: str, lanes: Sequence[Sequence[Call]]) -> None:
    """Let samples pass a unit, which is loaded, in lanes that are alike so far.

    Args:
        session: The model and its samples.
        walk: Their walk.
        unit: The unit.
        lanes: The calls of each lane, sample by sample.

    Raises:
        CheckpointError: If an output is NaN or infinite, or the model's code fails.
    """
    for first, *others in zip(*lanes, strict=True):
        with walk.present(first):
            # what a unit leaves in a cache, for later ones, each lane has to compute
            alone = _is_fixed((*first.args, *first.kwargs.values()))
            output = session.output(walk, unit, first)
            for call in others:
                with walk.present(call):
                    same = _copy(output) if alone else session.output(walk, unit, call)
                    walk.pass_on(call, same)
            walk.pass_on(first, output)


def _is_fixed(value: object) -> bool:
    """Whether a unit cannot leave anything in what it is given, as layers that share keys do."""
    if isinstance(value, tuple):
        return all(map(_is_fixed, value))
    return value is None or isinstance(value, torch.Tensor | bool | int | float | str)


def _copy(output: object) -> object:
    return _pytree.tree_map_only(torch.Tensor, torch.Tensor.clone, output)
