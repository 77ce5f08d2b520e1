"""Effective Model Pruning (arXiv 2509.25606) on a tensor of scores, in PyTorch, on its device.

    S1 = Σ s_i     S2 = Σ s_i²     N_eff = S1² / S2
    k = min(N, max(1, floor(β · N_eff · (1 + 1e-9))))

and N_eff = k = 0 where all scores are zero. The k largest of the N scores of a group are kept; of
equal scores, those with the lower index. Scores are magnitudes of weights, or what another
criterion computes from them, and never negative.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from emp_kernels.counting import exact_count, trusted_count

from emp_llm.errors import OptionError

__all__ = ["effective_number", "keep_mask"]

Dims = int | Sequence[int] | None


def effective_number(scores: torch.Tensor, *, dim: Dims = -1) -> torch.Tensor:
    """The effective number N_eff = (Σs)² / Σs² of each group of scores (arXiv 2509.25606).

    It is N for N equal scores and 1 if all but one are zero. In between it is the number of equal
    scores that are as concentrated.

    Args:
        scores: Of any shape and floating-point or integer dtype; finite and not negative.
        dim: The dimension or dimensions that make up a group; None for all of them. With -1, each
            row of a weight matrix [out, in] is a group, as in the paper.

    Returns:
        Float64, in the shape of `scores` without the dimensions of a group; 0 where all scores of
        the group are zero, otherwise from 1 to the number of its nonzero scores.

    Raises:
        OptionError: If a score is negative, NaN or infinite, or there is no such dimension.

    Four equal weights count as 4; in the second row, (3 + 1)² / (9 + 1) = 1.6:

    >>> weights = torch.tensor([[1.0, -1.0, 1.0, 1.0], [-3.0, 1.0, 0.0, 0.0]])
    >>> effective_number(weights.abs())
    tensor([4.0000, 1.6000], dtype=torch.float64)

    All eight as one group, (4 + 4)² / (4 + 10) = 4.57:

    >>> effective_number(weights.abs(), dim=None)
    tensor(4.5714, dtype=torch.float64)
    """
    groups, shape = _groups(scores, dim)
    s1, s2 = _moments(groups)
    return torch.where(s2 > 0, s1 * s1 / s2.clamp(min=torch.finfo(torch.float64).tiny), s2).reshape(
        shape
    )


def keep_mask(scores: torch.Tensor, *, beta: float = 1.0, dim: Dims = -1) -> torch.Tensor:
    """Which scores Effective Model Pruning keeps (arXiv 2509.25606).

    Args:
        scores: As for `effective_number`.
        beta: Multiplier of the effective number, finite and above 0; 1.0 is the paper's rule.
        dim: As for `effective_number`.

    Returns:
        Bool, in the shape of `scores`: True for the k largest of each group, at least one of them
        unless all are zero.

    Raises:
        OptionError: If beta is out of its range, or as for `effective_number`.

    The effective number of these weights is 6² / 12.5 = 2.88, so two of them stay:

    >>> weights = torch.tensor([0.5, -3.0, 1.5, -1.0])
    >>> mask = keep_mask(weights.abs())
    >>> mask
    tensor([False,  True,  True, False])
    >>> weights.where(mask, 0.0)
    tensor([ 0.0000, -3.0000,  1.5000,  0.0000])

    A larger β keeps more: floor(1.4 · 2.88) = 4 of them.

    >>> keep_mask(weights.abs(), beta=1.4)
    tensor([True, True, True, True])
    """
    if not (math.isfinite(beta) and beta > 0):
        raise OptionError(f"beta is {beta}; give a finite number above 0, such as 1.0")
    groups, _ = _groups(scores, dim)
    s1, s2 = _moments(groups)
    counts = [
        _count(group, total, squares, beta)
        for group, total, squares in zip(groups, s1.tolist(), s2.tolist(), strict=True)
    ]
    # stable: between equal scores, the one that comes first stays first
    order = groups.sort(dim=1, descending=True, stable=True).indices
    ranks = torch.arange(groups.shape[1], device=groups.device)
    kept = ranks < torch.tensor(counts, device=groups.device).unsqueeze(1)
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, kept)
    return _ungroup(mask, scores, dim)


def _dimensions(scores: torch.Tensor, dim: Dims) -> list[int]:
    """The dimensions of a group, from 0, ascending."""
    dims = range(scores.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    if any(not -scores.ndim <= d < scores.ndim for d in dims):
        raise OptionError(f"dim is {dim}; scores have {scores.ndim} dimensions")
    unique = sorted({d % scores.ndim for d in dims})
    if len(unique) != len(list(dims)):
        raise OptionError(f"dim is {dim}, which names a dimension twice")
    return unique


def _permutation(scores: torch.Tensor, dim: Dims) -> tuple[list[int], list[int]]:
    inner = _dimensions(scores, dim)
    outer = [d for d in range(scores.ndim) if d not in inner]
    return outer, inner


def _groups(scores: torch.Tensor, dim: Dims) -> tuple[torch.Tensor, list[int]]:
    """Scores as float64 [groups, N], and the shape of a result of one number a group."""
    outer, inner = _permutation(scores, dim)
    shape = [scores.shape[d] for d in outer]
    size = math.prod(scores.shape[d] for d in inner)
    groups = scores.permute(outer + inner).reshape(math.prod(shape), size).to(torch.float64)
    if not bool((torch.isfinite(groups) & (groups >= 0)).all()):
        raise OptionError("scores must be finite and not negative: give magnitudes, tensor.abs()")
    return groups, shape


def _ungroup(groups: torch.Tensor, scores: torch.Tensor, dim: Dims) -> torch.Tensor:
    """The inverse of `_groups`, for one value a score."""
    outer, inner = _permutation(scores, dim)
    order = outer + inner
    permuted = groups.reshape([scores.shape[d] for d in order])
    back = sorted(range(len(order)), key=order.__getitem__)
    return permuted.permute(back)


def _moments(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """S1 and S2 of each group, its scores divided by a power of two near the largest.

    That leaves N_eff as it is, and keeps squares from overflowing and from vanishing.
    """
    largest = groups.amax(dim=1) if groups.shape[1] else groups.new_zeros(len(groups))
    # within ±1000: some releases of torch compute ldexp by way of 2**exponent, which must be finite
    exponent = torch.frexp(largest).exponent.clamp(-1000, 1000)
    scaled = torch.ldexp(groups, -exponent.unsqueeze(1))
    return scaled.sum(dim=1), scaled.square().sum(dim=1)


def _count(group: torch.Tensor, s1: float, s2: float, beta: float) -> int:
    count = trusted_count(s1, s2, group.numel(), beta)
    if count is None:
        exact = [Fraction(score) for score in group.tolist()]
        count = exact_count(sum(exact, Fraction(0)), sum(s * s for s in exact), len(exact), beta)
    return count
