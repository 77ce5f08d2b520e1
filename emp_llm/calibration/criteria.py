"""How much a weight is worth: from it, and from what calibration found of its matrix.

A criterion is a class. Those of this file are registered by name; any other is found by
``module:Class``, or registered by `register_criterion`:

    class Squares(Criterion):
        needs = frozenset({"norms"})

        def scores(self, weight_RC, found):
            return (weight_RC.double() * found.norms_C).square().float()

Shapes in names: R rows (outputs) and C columns (inputs) of a matrix.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from emp_llm.calibration.statistics import Need
from emp_llm.errors import OptionError
from emp_llm.messages import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

    from emp_llm.calibration.statistics import Statistics


__all__ = ["Criterion", "score"]


_CHUNK = 1 << 18  # scores in float64 at a time: 2 MiB
_LEAST, _MOST = 2.0**-64, 2.0**127


class Criterion(ABC):
    """Turns weights, and statistics of their matrix's inputs, into scores; larger ones stay.

    Attributes:
        name: What it is called in reports; ``module:Class`` unless the class says otherwise.
        needs: The statistics that calibration has to gather: ``norms``, ``means``, ``hessian``, or
            ``gradient`` alone; of a `Statistics`, only these are there. Without any, no data is
            needed.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]] = frozenset()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" not in vars(cls):
            cls.name = f"{cls.__module__}:{cls.__qualname__}"

    @abstractmethod
    def scores(self, weight_RC: torch.Tensor, found: Statistics) -> torch.Tensor:
        """Score every weight of one matrix.

        The same arguments must give the same bits.

        Args:
            weight_RC: float32 [R, C], finite; rows are outputs, columns inputs. Not to be changed.
            found: What is known of the matrix, on the weights' device.

        Returns:
            float32 [R, C], finite and not negative, on the weights' device.
        """


def score(criterion: Criterion, weight_RC: torch.Tensor, found: Statistics) -> torch.Tensor:
    """The scores of a criterion, proved to be what they must be.

    Args:
        criterion: Any.
        weight_RC: float32 [R, C], finite.
        found: What the criterion needs.

    Returns:
        float32 [R, C], finite, 0 or above; zeros have no sign.

    Raises:
        OptionError: If the criterion's result is not that.
    """
    import torch

    where = f"criterion {criterion.name!r}, {found.tensor}"
    try:
        scores_RC = criterion.scores(weight_RC, found)
    except Exception as error:  # whatever a criterion of the user's raises
        if type(criterion).__module__ == __name__:
            raise
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
    if not 0 <= low <= high < float("inf"):  # NaN is at both edges
        raise OptionError(
            f"{where}: scores are from {low} to {high}; return finite ones that are 0 or above"
        )
    return scores_RC.detach().abs()


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _in_float32(
    weight_RC: torch.Tensor, rows: Callable[[slice, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Scores that are worked out in float64, a few rows at a time, as float32.

    Where the largest is 2¹²⁷ or more, or below 2⁻⁶⁴, all of them are multiplied by the power of two
    that brings it to between 1 and 2: neither N_eff nor any order changes, no score is infinite,
    and small weights do not all become zero. The scores of such a matrix cannot be compared with
    those of others.

    Args:
        weight_RC: float32 [R, C].
        rows: Of some rows, a slice and their magnitudes in float64, the scores in float64.

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
    """Some rows at a time: which ones, and their magnitudes in float64."""
    step = max(1, _CHUNK // max(1, weight_RC.shape[1]))
    for start in range(0, weight_RC.shape[0], step):
        some = slice(start, start + step)
        yield some, weight_RC[some].double().abs()


class Magnitude(Criterion):
    """|w|: what EMP, and magnitude pruning before it, ranks by (Han et al., arXiv 1506.02626)."""

    name = "magnitude"

    def scores(self, weight_RC: torch.Tensor, found: Statistics) -> torch.Tensor:  # noqa: ARG002
        """|w|, exactly."""
        return weight_RC.abs()


class Wanda(Criterion):
    """|w_rc| · ‖x_c‖₂ (Sun et al., "A Simple and Effective Pruning Approach", arXiv 2306.11695).

    The norm of an input is over all calibration tokens. The published code divides its square by
    the number of samples, which changes neither the order nor N_eff.
    """

    name = "wanda"
    needs = frozenset({"norms"})

    def scores(self, weight_RC: torch.Tensor, found: Statistics) -> torch.Tensor:
        """|w_rc| · ‖x_c‖₂."""
        norms_C = _there(found.norms_C)
        return _in_float32(weight_RC, lambda _, size_rC: size_rC * norms_C)


class Ria(Criterion):
    """(|w_rc| / Σ_r |w_rc| + |w_rc| / Σ_c |w_rc|) · ‖x_c‖₂^½: relative importance and activations.

    Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
    Models", ICLR 2024, with their a = 0.5. A weight is measured against its column and against its
    row. Where a column or a row is all zeros, so is its part.
    """

    name = "ria"
    needs = frozenset({"norms"})

    def scores(self, weight_RC: torch.Tensor, found: Statistics) -> torch.Tensor:
        """(|w_rc| / Σ_r |w_rc| + |w_rc| / Σ_c |w_rc|) · ‖x_c‖₂^½."""
        import torch

        columns_C = torch.zeros(weight_RC.shape[1], dtype=torch.float64, device=weight_RC.device)
        for _, size_rC in _sizes(weight_RC):
            columns_C += size_rC.sum(0)
        per_column_C = _inverse(columns_C)
        roots_C = _there(found.norms_C).sqrt()

        def rows(_: slice, size_rC: torch.Tensor) -> torch.Tensor:
            per_row_r1 = _inverse(size_rC.sum(1, keepdim=True))
            return (size_rC * per_column_C + size_rC * per_row_r1) * roots_C

        return _in_float32(weight_RC, rows)


class Taylor(Criterion):
    """|w · ∂L/∂w|: how much the loss changes, to first order, when the weight becomes zero.

    Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference",
    arXiv 1611.06440, weight by weight. L is the mean loss of the calibration tokens in nats.
    """

    name = "taylor"
    needs = frozenset({"gradient"})

    def scores(self, weight_RC: torch.Tensor, found: Statistics) -> torch.Tensor:
        """|w · ∂L/∂w|."""
        gradient_RC = _there(found.gradient_RC)
        return _in_float32(weight_RC, lambda some, size_rC: size_rC * gradient_RC[some].abs())


class Obs(Criterion):
    """w_rc² / [H⁻¹]_cc, H = Σ_t x_t x_tᵀ + λI: the optimal brain surgeon's saliency.

    Half of it is by how much the squared error of the matrix's outputs grows, at least, when the
    weight becomes zero and all others of its row adapt (Hassibi & Stork, 1992; Frantar & Alistarh,
    SparseGPT, arXiv 2301.00774, whose H is twice this one: no order and no N_eff depends on such a
    factor). λ is 1 % of the mean of H's diagonal, as in SparseGPT. SparseGPT goes on to update
    [H⁻¹] column by column; here it is that of the whole matrix, so that no score depends on the
    order of the columns. Inputs that are zero at every token give scores of zero.
    """

    name = "obs"
    needs = frozenset({"hessian"})

    def scores(self, weight_RC: torch.Tensor, found: Statistics) -> torch.Tensor:
        """w_rc² / [H⁻¹]_cc."""
        import torch

        from emp_llm.calibration.hessian import dead_columns, factored

        hessian_CC = _there(found.hessian_CC)
        factor_CC, _ = factored(hessian_CC)
        inverse_CC = torch.cholesky_inverse(factor_CC, out=factor_CC)
        inverse_C = inverse_CC.diagonal().double()
        del factor_CC, inverse_CC
        worth_C = torch.where(dead_columns(hessian_CC), 0.0, 1.0 / inverse_C)
        return _in_float32(weight_RC, lambda _, size_rC: size_rC.square() * worth_C)


class Random(Criterion):
    """Uniformly distributed in [0, 1): the control that every other criterion has to beat.

    The numbers depend on the seed, the tensor's name and the row in it, and on nothing else.
    """

    name = "random"

    def scores(self, weight_RC: torch.Tensor, found: Statistics) -> torch.Tensor:
        """Multiples of 2⁻²⁴ in [0, 1)."""
        import numpy as np
        import torch

        from emp_llm.selection.ranking import random_keys

        scores_RC = torch.empty_like(weight_RC, device="cpu")
        for row, scores_C in enumerate(scores_RC):
            keys = random_keys(found.seed, found.tensor, found.first_row + row, len(scores_C))
            scores_C.copy_(torch.from_numpy((keys >> np.uint32(8)).astype(np.float32)))
        return scores_RC.mul_(2.0**-24).to(weight_RC.device)


def _there(statistic: torch.Tensor | None) -> torch.Tensor:
    if statistic is None:
        raise AssertionError("a statistic that the criterion needs was not gathered")
    return statistic


def _inverse(sums: torch.Tensor) -> torch.Tensor:
    """1 / sums, 0 where a sum is 0."""
    import torch

    return torch.where(sums == 0, 0.0, 1.0 / sums)
