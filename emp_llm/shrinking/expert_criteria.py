"""Scores of experts: those of one decoder block, from their weights or from what they give on data.

A criterion is a class. Those of this file are registered by name; your own is registered by
`register_expert_criterion`, or named as ``module:Class``.

Shapes in names: E experts of a decoder block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from emp_llm.errors import OptionError
from emp_llm.messages import first_line
from emp_llm.selection.ranking import random_keys

if TYPE_CHECKING:
    from emp_llm.shrinking.routed_outputs import RoutedOutputs

__all__ = [
    "Aimer",
    "BlockExperts",
    "ExpertCriterion",
    "ExpertNeed",
    "Norm",
    "Random",
    "Reap",
    "WeightSums",
    "score_experts",
]

Floats = npt.NDArray[np.float64]

_Sums = TypeVar("_Sums")

ExpertNeed = Literal["weights", "outputs"]
"""What a criterion can ask for: sums over weights, which need no data, or over outputs."""


@dataclass(frozen=True, eq=False)
class WeightSums:
    """Sums over all weights of each expert's matrices; biases and shared experts are left out.

    Attributes:
        numbers_E: float64 [E], how many weights.
        magnitudes_E: float64 [E], Σ |w|.
        squares_E: float64 [E], Σ w².
    """

    numbers_E: Floats
    magnitudes_E: Floats
    squares_E: Floats


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockExperts:
    """What is known of the experts of one decoder block; only what was asked for is there.

    Attributes:
        block: The block's name in the checkpoint.
        number: E, how many experts there are.
        seed: The seed, for criteria that draw random numbers.
        weights: Sums over their weights.
        outputs: Sums over what they give on data.
    """

    block: str
    number: int
    seed: int = 0
    weights: WeightSums | None = None
    outputs: RoutedOutputs | None = None


class ExpertCriterion(ABC):
    """Scores the experts of a decoder block; those with the best scores stay.

    Your own is a class with `scores` and `needs`. This one keeps the experts that most tokens are
    sent to:

    >>> from emp_llm import ExpertCriterion
    >>> class Frequency(ExpertCriterion):
    ...     needs = frozenset({"outputs"})
    ...
    ...     def scores(self, experts):
    ...         return experts.outputs.tokens_E

    In a file ``mine.py`` of the current directory, it is used by ``emp-llm shrink MODEL --out DIR
    --experts 8 --score mine:Frequency --calibration wikitext2``.

    Attributes:
        name: What it is called in reports; ``module:Class`` unless the class sets another name.
        needs: What it has to be given: any of ``weights``, for which no data is needed, and
            ``outputs``.
        prefers: Whether the experts with the highest or the lowest scores stay.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[ExpertNeed]] = frozenset()
    prefers: ClassVar[Literal["high", "low"]] = "high"

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in vars(cls):
            cls.name = f"{cls.__module__}:{cls.__qualname__}"

    @abstractmethod
    def scores(self, experts: BlockExperts) -> npt.ArrayLike:
        """Score every expert of one decoder block.

        Equal arguments must give equal bits, so that a run that is continued gives the same result.

        Args:
            experts: What is known of them.

        Returns:
            E numbers, finite and not negative.
        """


def score_experts(criterion: ExpertCriterion, experts: BlockExperts) -> tuple[float, ...]:
    """The scores of a criterion, checked.

    Raises:
        OptionError: If the criterion fails, or returns anything but E finite numbers of 0 or above.
    """
    where = f"score {criterion.name!r}, {experts.block}"
    try:
        scores_E = np.asarray(criterion.scores(experts), np.float64)
    except Exception as error:  # anything that a user's criterion raises
        if type(criterion).__module__ == __name__:
            raise  # a bug of ours keeps its traceback
        raise OptionError(
            f"{where}: scores() fails with {type(error).__name__}: {first_line(error)}"
        ) from error
    if scores_E.shape != (experts.number,):
        raise OptionError(
            f"{where}: scores are {list(scores_E.shape)}; return [{experts.number}], a number for "
            "each expert"
        )
    low, high = scores_E.min(), scores_E.max()
    if not 0 <= low <= high < np.inf:  # with a NaN, both are NaN
        raise OptionError(
            f"{where}: scores are from {low} to {high}; return finite ones that are 0 or above"
        )
    return tuple(scores_E.tolist())


class Aimer(ExpertCriterion):
    """mean|w| / rms(w) over all weights of an expert; the lowest stay: AIMER, arXiv 2603.18492.

    That is √(N_eff / N) with magnitudes as scores of weights: an expert goes if it would keep a
    large share of its weights by the rule of `emp_llm.rule`, as its magnitudes differ the least.
    """

    name = "aimer"
    needs = frozenset({"weights"})
    prefers = "low"

    def scores(self, experts: BlockExperts) -> Floats:
        """√(N_eff / N), from 0 to 1; 1 for an expert of zeros, whose magnitudes do not differ."""
        sums = _given(experts.weights)
        rms_E = np.sqrt(sums.squares_E / sums.numbers_E)
        ones_E = np.ones(experts.number)
        return np.divide(sums.magnitudes_E / sums.numbers_E, rms_E, out=ones_E, where=rms_E > 0)


class Norm(ExpertCriterion):
    """‖w‖₂ over all weights of an expert: magnitude pruning of experts, a control."""

    name = "norm"
    needs = frozenset({"weights"})

    def scores(self, experts: BlockExperts) -> Floats:
        """‖w‖₂."""
        return np.sqrt(_given(experts.weights).squares_E)


class Reap(ExpertCriterion):
    """The mean of g ‖f(x)‖₂ over the tokens x that an expert is sent: REAP, arXiv 2510.13999.

    f(x) is the expert's output, and g is what the model multiplies it by: its gate, after whatever
    the router does to the gates of a token's experts. An expert without tokens scores 0.
    """

    name = "reap"
    needs = frozenset({"outputs"})

    def scores(self, experts: BlockExperts) -> Floats:
        """Σ g ‖f(x)‖₂ / tokens."""
        outputs = _given(experts.outputs)
        return outputs.contributions_E / np.maximum(outputs.tokens_E, 1)


class Random(ExpertCriterion):
    """Uniformly distributed in [0, 1): a control that every other criterion has to beat.

    The scores depend on nothing but the seed and the block's name.
    """

    name = "random"

    def scores(self, experts: BlockExperts) -> Floats:
        """Multiples of 2⁻³² in [0, 1)."""
        keys_E = random_keys(experts.seed, experts.block, 0, experts.number)
        return keys_E.astype(np.float64) * 2.0**-32


def _given(sums: _Sums | None) -> _Sums:
    if sums is None:
        raise AssertionError("sums that the criterion needs were not gathered")
    return sums
