"""Scores of experts: those of one decoder block, from their weights or from what they give on data.

A criterion is a class. Those of this file are registered by name; your own is registered by
`register_expert_criterion`, or named as ``module:Class``.

Shapes in names: E experts of a decoder block, R rows and C columns of a matrix.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from emp_llm.errors import CheckpointError, OptionError
from emp_llm.messages import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import torch

    from emp_llm.shrinking.routed_outputs import RoutedOutputs

__all__ = [
    "Aimer",
    "BlockExperts",
    "ExpertCriterion",
    "ExpertNeed",
    "Norm",
    "Random",
    "Reap",
    "score_experts",
]

ExpertNeed = Literal["outputs"]
"""What a criterion can ask calibration to gather."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockExperts:
    """The experts of one decoder block.

    Attributes:
        block: The block's name in the checkpoint.
        number: E, how many there are.
        matrices: Reads the matrices of one expert, by its number, one after the other: float32
            [R, C], in the order of their names. Shared experts and biases are not among them.
        outputs: What the experts give on data; None unless the criterion needs it.
        seed: The seed, for criteria that draw random numbers.
    """

    block: str
    number: int
    matrices: Callable[[int], Iterable[torch.Tensor]]
    outputs: RoutedOutputs | None = None
    seed: int = 0


class ExpertCriterion(ABC):
    """Scores the experts of a decoder block; those with the largest scores stay.

    Your own is a class with `scores`, and with `needs` if it needs data. This one scores experts by
    how many tokens they are sent:

    >>> from emp_llm import ExpertCriterion
    >>> class Frequency(ExpertCriterion):
    ...     needs = frozenset({"outputs"})
    ...
    ...     def scores(self, experts):
    ...         return experts.outputs.tokens_E.double()

    In a file ``mine.py`` of the current directory, it is used by ``emp-llm shrink MODEL --out DIR
    --experts 8 --score mine:Frequency --calibration wikitext2``.

    Attributes:
        name: What it is called in reports; ``module:Class`` unless the class sets another name.
        needs: ``frozenset({"outputs"})`` if it needs data; empty if it needs none.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[ExpertNeed]] = frozenset()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in vars(cls):
            cls.name = f"{cls.__module__}:{cls.__qualname__}"

    @abstractmethod
    def scores(self, experts: BlockExperts) -> torch.Tensor:
        """Score every expert of one decoder block.

        Equal arguments must give equal bits, so that a run that is continued gives the same result.

        Args:
            experts: The experts.

        Returns:
            float64 [E], finite and not negative.
        """


def score_experts(criterion: ExpertCriterion, experts: BlockExperts) -> tuple[float, ...]:
    """The scores of a criterion, checked.

    Raises:
        CheckpointError: If weights are not finite.
        OptionError: If the criterion fails, or returns anything but E finite numbers of 0 or above.
    """
    import torch

    where = f"expert score {criterion.name!r}, {experts.block}"
    own = type(criterion).__module__ == __name__
    try:
        scores_E = criterion.scores(experts)
    except Exception as error:  # anything that a user's criterion raises
        if own:
            raise  # a bug of ours keeps its traceback
        raise OptionError(
            f"{where}: scores() fails with {type(error).__name__}: {first_line(error)}"
        ) from error
    if not isinstance(scores_E, torch.Tensor):
        raise OptionError(f"{where}: scores are a {type(scores_E).__name__}; return a tensor")
    if scores_E.shape != (experts.number,):
        raise OptionError(
            f"{where}: scores are {list(scores_E.shape)}; return [{experts.number}], one for each "
            "expert"
        )
    scores = tuple(map(float, scores_E.tolist()))
    if not all(0 <= score < math.inf for score in scores):
        if own:
            raise CheckpointError(
                f"{experts.block}: holds NaN or infinity, which no model can compute with: repair "
                "the checkpoint"
            )
        raise OptionError(
            f"{where}: scores are from {min(scores)} to {max(scores)}; return finite ones that are "
            "0 or above"
        )
    return scores


class Aimer(ExpertCriterion):
    """1 - mean|w| / rms(w) over all weights of an expert's matrices: AIMER, arXiv 2603.18492.

    AIMER prunes the experts whose mean|w| / rms(w) is the largest. With magnitudes as scores of
    weights, that quotient is √(N_eff / N): the experts stay whose weights are the most unequal.
    """

    name = "aimer"

    def scores(self, experts: BlockExperts) -> torch.Tensor:
        """1 - √(N_eff / N); 0 for an expert of zeros."""
        import torch

        sums_E = [_Sums.of(experts.matrices(expert)) for expert in range(experts.number)]
        return 1 - torch.tensor([sums.evenness for sums in sums_E], dtype=torch.float64)


class Norm(ExpertCriterion):
    """‖w‖₂ over all weights of an expert's matrices: magnitude pruning of experts, a control."""

    name = "norm"

    def scores(self, experts: BlockExperts) -> torch.Tensor:
        """‖w‖₂."""
        import torch

        sums_E = [_Sums.of(experts.matrices(expert)) for expert in range(experts.number)]
        return torch.tensor([sums.squares for sums in sums_E], dtype=torch.float64).sqrt()


class Reap(ExpertCriterion):
    """The mean of g ‖f(x)‖₂ over the tokens x that an expert is sent: REAP, arXiv 2510.13999.

    f(x) is the expert's output, and g is what the model multiplies it by: its gate, after whatever
    the router does to the gates of a token's experts. An expert without tokens scores 0.
    """

    name = "reap"
    needs = frozenset({"outputs"})

    def scores(self, experts: BlockExperts) -> torch.Tensor:
        """Σ g ‖f(x)‖₂ / tokens."""
        if experts.outputs is None:
            raise AssertionError("outputs that the criterion needs were not gathered")
        return experts.outputs.contributions_E / experts.outputs.tokens_E.clamp(min=1)


class Random(ExpertCriterion):
    """Uniformly distributed in [0, 1): a control that every other criterion has to beat.

    The scores depend on nothing but the seed and the block's name.
    """

    name = "random"

    def scores(self, experts: BlockExperts) -> torch.Tensor:
        """Multiples of 2⁻³² in [0, 1)."""
        import torch

        from emp_llm.selection.ranking import random_keys

        keys_E = random_keys(experts.seed, experts.block, 0, experts.number)
        return torch.from_numpy(keys_E.astype("f8")) * 2.0**-32


@dataclass(frozen=True)
class _Sums:
    """Sums over all weights of one expert, in float64."""

    weights: int
    magnitudes: float
    squares: float

    @classmethod
    def of(cls, matrices: Iterable[torch.Tensor]) -> _Sums:
        weights, magnitudes, squares = 0, 0.0, 0.0
        for matrix_RC in matrices:
            exact_RC = matrix_RC.double()
            weights += exact_RC.numel()
            magnitudes += exact_RC.abs().sum().item()
            squares += exact_RC.square_().sum().item()
        return cls(weights, magnitudes, squares)

    @property
    def evenness(self) -> float:
        """mean|w| / rms(w), between 0 and 1; 1 where all weights are zero."""
        rms = math.sqrt(self.squares / self.weights) if self.weights else 0.0
        return self.magnitudes / self.weights / rms if rms else 1.0
