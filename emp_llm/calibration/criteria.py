"""Criteria: scores of weights, from the weights and from statistics of their matrix's inputs.

A criterion is a class. Those of this file are registered by name; your own is registered by
`register_criterion`, or named as ``module:Class``.

Shapes in names: R rows (outputs) and C columns (inputs) of a matrix, r some of the rows.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from emp_llm.calibration.hessian import Worth
from emp_llm.calibration.statistics import Need
from emp_llm.errors import OptionError
from emp_llm.messages import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from emp_llm.calibration.statistics import Statistics


__all__ = ["Criterion", "score"]


_CHUNK = 1 << 18
"""Scores that are computed in float64 at a time: 2 MiB."""

_LEAST, _MOST = 2.0**-64, 2.0**127
"""Scores are scaled where the largest lies outside of these."""


class Criterion(ABC):
    """Computes scores from weights and statistics of their inputs; the largest scores stay.

    Your own criterion is a class with `scores`, and with `needs` if it needs data:

    >>> import torch
    >>> from emp_llm import Criterion
    >>> class Saliency(Criterion):
    ...     needs = frozenset({"norms"})
    ...
    ...     def scores(self, weight_RC, statistics):
    ...         return (weight_RC.double() * statistics.norms_C).square().float()

    In a file ``mine.py`` of the current directory, it is used by
    ``emp-llm prune MODEL --out DIR --criterion mine:Saliency --calibration wikitext2``, or by
    ``PruneOptions(criterion="mine:Saliency", calibration=CalibrationOptions(text="wikitext2"))``.
    What it is given, and has to return:

    >>> from emp_llm.calibration.statistics import Statistics
    >>> norms_C = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> weight_RC = torch.tensor([[3.0, -1.0]])
    >>> Saliency().scores(weight_RC, Statistics(tensor="w", norms_C=norms_C))
    tensor([[9., 4.]])

    Attributes:
        name: What it is called in reports; ``module:Class`` unless the class sets another name.
        needs: The statistics that calibration has to gather: any of ``norms``, ``means`` and
            ``hessian``, or ``gradient`` alone. The others are None in the `Statistics` that
            `scores` gets. If empty, no data is needed.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in vars(cls):
            cls.name = f"{cls.__module__}:{cls.__qualname__}"

    @abstractmethod
    def scores(self, weight_RC: torch.Tensor, statistics: Statistics) -> torch.Tensor:
        """Score every weight of one matrix.

        Equal arguments must give equal bits, so that a run that is continued gives the same result.

        Args:
            weight_RC: float32 [R, C], finite; rows are outputs, columns are inputs. It must not be
                changed.
            statistics: What calibration found of the matrix, on the weights' device.

        Returns:
            float32 [R, C], finite and not negative, on the weights' device.
        """


def score(criterion: Criterion, weight_RC: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    """The scores of a criterion, checked.

    Args:
        criterion: Any criterion.
        weight_RC: float32 [R, C], finite.
        statistics: What the criterion needs.

    Returns:
        float32 [R, C], finite and not negative; no zero has a sign, for scores are ranked by their
        bit patterns.

    Raises:
        OptionError: If the criterion fails, or returns anything else.
    """
    import torch

    where = f"criterion {criterion.name!r}, {statistics.tensor}"
    try:
        scores_RC = criterion.scores(weight_RC, statistics)
    except Exception as error:  # anything that a user's criterion raises
        if type(criterion).__module__ == __name__:
            raise  # a bug of ours keeps its traceback
        raise OptionError(
            f"{where}: scores() fails with {type(error).__name__}: {first_line(error)}"
        ) from error
    if not isinstance(scores_RC, torch.Tensor):
        raise OptionError(f"{where}: scores are a {type(scores_RC).__name__}; return a tensor")
    if scores_RC.dtype != torch.float32 or scores_RC.shape != weight_RC.shape:
        raise OptionError(
            f"{where}: scores are {_kind(scores_RC)}; return {_kind(weight_RC)} as the weights are"
        )
    low, high = (edge.item() for edge in scores_RC.aminmax()) if scores_RC.numel() else (0.0, 0.0)
    if not 0 <= low <= high < float("inf"):  # with a NaN, both are NaN
        raise OptionError(
            f"{where}: scores are from {low} to {high}; return finite ones that are 0 or above"
        )
    return scores_RC.detach().abs()


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _in_float32(
    weight_RC: torch.Tensor, rows: Callable[[slice, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Scores that are computed in float64, a few rows at a time, as float32.

    Where the largest score is 2¹²⁷ or more, or below 2⁻⁶⁴, all are multiplied by the power of two
    that brings it to between 1 and 2. This changes neither N_eff nor the order, no score becomes
    infinite, and small ones do not all become zero. The scores of such a matrix cannot be compared
    with those of other matrices.

    Args:
        weight_RC: float32 [R, C].
        rows: Returns the scores of some rows, float64 [r, C]; called with a slice and the rows'
            magnitudes, float64 [r, C].

    Returns:
        float32 [R, C].
    """
    import torch

    scores_RC = torch.empty_like(weight_RC, memory_format=torch.contiguous_format)

    def fill(exponent: int) -> float:
        largest = 0.0
        for some, size_rC in _sizes(weight_RC):
            chunk = rows(some, size_rC)
            if chunk.numel():
                largest = max(largest, chunk.max().item())
            scores_RC[some] = chunk * 2.0**exponent
        return largest

    largest = fill(0)
    if largest != 0 and not _LEAST <= largest < _MOST:
        fill(1 - math.frexp(largest)[1])
    return scores_RC


def _sizes(weight_RC: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some rows at a time: which ones, and their magnitudes, float64 [r, C]."""
    step = max(1, _CHUNK // max(1, weight_RC.shape[1]))
    for start in range(0, weight_RC.shape[0], step):
        some = slice(start, start + step)
        yield some, weight_RC[some].double().abs()


class Magnitude(Criterion):
    """|w|: magnitude pruning (Han et al., arXiv 1506.02626), and EMP's default."""

    name = "magnitude"

    def scores(self, weight_RC: torch.Tensor, *_: object) -> torch.Tensor:
        """|w|, exactly."""
        return weight_RC.abs()


class Wanda(Criterion):
    """|w_rc| · ‖x_c‖₂ (Sun et al., "A Simple and Effective Pruning Approach", arXiv 2306.11695).

    ‖x_c‖₂ is over all calibration tokens. The published code divides its square by the number of
    samples, which changes neither the order nor N_eff.
    """

    name = "wanda"
    needs = frozenset({"norms"})

    def scores(self, weight_RC: torch.Tensor, statistics: Statistics) -> torch.Tensor:
        """|w_rc| · ‖x_c‖₂."""
        norms_C = _gathered(statistics.norms_C)
        return _in_float32(weight_RC, lambda _, size_rC: size_rC * norms_C)


class Ria(Criterion):
    """(|w_rc| / Σ_r |w_rc| + |w_rc| / Σ_c |w_rc|) · ‖x_c‖₂^½: relative importance and activations.

    Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
    Models", ICLR 2024, with their a = 0.5. A weight is compared with the sum of its column and with
    that of its row. Where a column or a row is all zeros, so is its term.
    """

    name = "ria"
    needs = frozenset({"norms"})

    def scores(self, weight_RC: torch.Tensor, statistics: Statistics) -> torch.Tensor:
        """(|w_rc| / Σ_r |w_rc| + |w_rc| / Σ_c |w_rc|) · ‖x_c‖₂^½."""
        import torch

        # column sums are needed before the first row can be scored: one pass more over the weights
        columns_C = torch.zeros(weight_RC.shape[1], dtype=torch.float64, device=weight_RC.device)
        for _, size_rC in _sizes(weight_RC):
            columns_C += size_rC.sum(0)
        per_column_C = _inverse(columns_C)
        roots_C = _gathered(statistics.norms_C).sqrt()

        def rows(_: slice, size_rC: torch.Tensor) -> torch.Tensor:
            per_row_r1 = _inverse(size_rC.sum(1, keepdim=True))
            return (size_rC * per_column_C + size_rC * per_row_r1) * roots_C

        return _in_float32(weight_RC, rows)


class Taylor(Criterion):
    """|w · ∂L/∂w|: how much the loss changes, to first order, when the weight becomes zero.

    Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference",
    arXiv 1611.06440, applied to single weights. L is the mean loss of the calibration tokens in
    nats.
    """

    name = "taylor"
    needs = frozenset({"gradient"})

    def scores(self, weight_RC: torch.Tensor, statistics: Statistics) -> torch.Tensor:
        """|w · ∂L/∂w|."""
        gradient_RC = _gathered(statistics.gradient_RC)
        return _in_float32(weight_RC, lambda some, size_rC: size_rC * gradient_RC[some].abs())


class Obs(Criterion):
    """w_rc² / [H⁻¹]_cc, H = Σ_t x_t x_tᵀ + λI: the saliency of the optimal brain surgeon.

    It is the smallest increase of the squared error of the matrix's outputs when the weight becomes
    zero and all others of its row adapt (Hassibi & Stork, 1992; Frantar & Alistarh, SparseGPT,
    arXiv 2301.00774, whose H is twice this one: a constant factor changes neither the order nor
    N_eff). λ is 1 % of the mean of H's diagonal, as in SparseGPT. SparseGPT updates [H⁻¹] column by
    column; here it is that of the whole matrix, so that scores do not depend on the order of the
    columns. Inputs that are zero at every token give scores of zero.
    """

    name = "obs"
    needs = frozenset({"hessian"})

    def __init__(self) -> None:
        self._worth = Worth()

    def scores(self, weight_RC: torch.Tensor, statistics: Statistics) -> torch.Tensor:
        """w_rc² / [H⁻¹]_cc."""
        worth_C = self._worth(_gathered(statistics.hessian_CC))
        return _in_float32(weight_RC, lambda _, size_rC: size_rC.square() * worth_C)


class Random(Criterion):
    """Uniformly distributed in [0, 1): a control that every other criterion has to beat.

    The scores depend on nothing but the seed, the tensor's name and the number of the row.
    """

    name = "random"

    def scores(self, weight_RC: torch.Tensor, statistics: Statistics) -> torch.Tensor:
        """Multiples of 2⁻²⁴ in [0, 1)."""
        import numpy as np
        import torch

        from emp_llm.selection.ranking import random_keys

        scores_RC = torch.empty_like(weight_RC, device="cpu")
        for row, scores_C in enumerate(scores_RC):
            keys = random_keys(
                statistics.seed, statistics.tensor, statistics.first_row + row, len(scores_C)
            )
            scores_C.copy_(torch.from_numpy((keys >> np.uint32(8)).astype(np.float32)))
        return scores_RC.mul_(2.0**-24).to(weight_RC.device)


def _gathered(statistic: torch.Tensor | None) -> torch.Tensor:
    if statistic is None:
        raise AssertionError("a statistic that the criterion needs was not gathered")
    return statistic


def _inverse(sums: torch.Tensor) -> torch.Tensor:
    """1 / sums, 0 where a sum is 0."""
    import torch

    return torch.where(sums == 0, 0.0, 1.0 / sums)
