"""Which inputs of a matrix stay when whole structures go, and its new weights.

The outputs of neurons, or of groups of heads, are inputs of one matrix: of a down projection, or of
an output projection. Each structure's are a run of its columns, as long as all others.

Shapes in names: R rows (outputs) and C columns (inputs) of the matrix, S structures of W columns
each, so that C = S · W; K of the columns are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from emp_llm.calibration.hessian import factored

if TYPE_CHECKING:
    from emp_llm.calibration.repair import LeastSquares

__all__ = ["columns_of", "contributions", "least_error", "refitted"]

_TINY = 1e-6
"""What is added to a diagonal that is damped already, relative to its mean, to factor it."""

_ROUNDS = 64
"""In how many rounds structures go; what each one costs is computed anew after a round."""


def columns_of(structures_S: torch.Tensor, width: int) -> torch.Tensor:
    """Which columns belong to some structures: bool [S] to bool [C]."""
    return structures_S.repeat_interleave(width)


def contributions(
    weight_RC: torch.Tensor, hessian_CC: torch.Tensor, structures: int
) -> torch.Tensor:
    """How much each structure contributes to the outputs: the norm ‖W_s X_s‖ over all tokens.

    For a neuron, that is the norm of its activations times the norm of its column.

    Args:
        weight_RC: float32 [R, C], W.
        hessian_CC: float32 [C, C], H = X Xᵀ, where the columns of X are the inputs x_t.
        structures: S.

    Returns:
        float64 [S].
    """
    return _energies(weight_RC, _diagonal_blocks(hessian_CC, structures)).clamp_(min=0).sqrt_()


def least_error(
    squares: LeastSquares, structures: int, keep: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Structures to keep, so that the matrix, fitted anew to those, errs little.

    Starting from the weights V that are best with all structures, structure s costs

        Σ_rows v_s ([(H + λI)⁻¹]_ss)⁻¹ v_sᵀ,

    by which the rows' sums of squares rise if it goes and all others adapt: the optimal brain
    surgeon (Hassibi & Stork, 1992) for columns of a matrix, as in ZipLM (Kurtic et al., arXiv
    2302.04089). In each round, those that cost least go, and weights and inverse are updated.

    Args:
        squares: What each row is to minimize.
        structures: S.
        keep: How many to keep, from 1 to S.

    Returns:
        kept_S: bool [S].
        costs_S: float64 [S], the square root of what each one costs: those that go when they go,
            the others at the end.
    """
    inverse_CC = _inverse(squares.damped_CC)
    best_RC = squares.weight_RC.clone()
    if squares.shift_RC is not None:
        best_RC.addmm_(squares.shift_RC, inverse_CC)
    kept_S = torch.ones(structures, dtype=torch.bool, device=best_RC.device)
    costs_S = _costs(best_RC, inverse_CC, structures)
    left = structures - keep
    step = -(-left // _ROUNDS)
    while left:
        order_S = costs_S.masked_fill(~kept_S, torch.inf).argsort(stable=True)
        going = order_S[: min(step, left)]
        kept_S[going] = False
        left -= len(going)
        gone_S = torch.zeros_like(kept_S)
        gone_S[going] = True
        _remove(best_RC, inverse_CC, columns_of(gone_S, len(inverse_CC) // structures))
        costs_S = torch.where(kept_S, _costs(best_RC, inverse_CC, structures), costs_S)
    return kept_S, costs_S.clamp_(min=0).sqrt_()


def refitted(squares: LeastSquares, kept_C: torch.Tensor) -> torch.Tensor:
    """The weights that minimize each row's sum of squares with some of the columns alone.

    All rows keep the same columns, so that one factor solves them: with d = v - w on these,
    d (H + λI)_KK = w (H + λI) on these, w being zero on them, + w (D - H) / 2.

    Args:
        squares: What each row is to minimize.
        kept_C: bool [C].

    Returns:
        float32 [R, C], zero in the other columns.
    """
    damped_KC = squares.damped_CC[kept_C]
    lost_RC = squares.weight_RC.masked_fill(kept_C, 0.0)
    wanted_RK = lost_RC @ damped_KC.T
    if squares.shift_RC is not None:
        wanted_RK += squares.shift_RC[:, kept_C]
    damped_KK = damped_KC[:, kept_C]
    lower_KK, _ = factored(damped_KK, _TINY)
    change_RK = torch.cholesky_solve(wanted_RK.T, lower_KK).T
    # a step of iterative refinement, for the factor is that of a slightly larger diagonal
    left_RK = wanted_RK.addmm_(change_RK, damped_KK, alpha=-1)
    change_RK = change_RK + torch.cholesky_solve(left_RK.T, lower_KK).T
    found_RC = torch.zeros_like(squares.weight_RC)
    found_RC[:, kept_C] = squares.weight_RC[:, kept_C] + change_RK
    return found_RC


def _inverse(damped_CC: torch.Tensor) -> torch.Tensor:
    lower_CC, _ = factored(damped_CC, _TINY)
    # the inverse takes the factor's place in memory
    return torch.cholesky_inverse(lower_CC, out=lower_CC)


def _costs(weight_RC: torch.Tensor, inverse_CC: torch.Tensor, structures: int) -> torch.Tensor:
    """What each structure costs, float64 [S]."""
    blocks_SWW = _diagonal_blocks(inverse_CC, structures)
    return _energies(weight_RC, torch.linalg.inv(blocks_SWW))


def _remove(best_RC: torch.Tensor, inverse_CC: torch.Tensor, gone_C: torch.Tensor) -> None:
    """Have all other columns adapt to the removal of some, and update the inverse for it."""
    taken_KC = torch.linalg.solve(inverse_CC[gone_C][:, gone_C], inverse_CC[gone_C])
    best_RC.addmm_(best_RC[:, gone_C], taken_KC, alpha=-1)
    inverse_CC.addmm_(inverse_CC[:, gone_C], taken_KC, alpha=-1)
    # rows and columns of a unit matrix, so that blocks of those that are gone have an inverse
    best_RC[:, gone_C] = 0.0
    inverse_CC[gone_C] = 0.0
    inverse_CC[:, gone_C] = 0.0
    inverse_CC.diagonal()[gone_C] = 1.0


def _diagonal_blocks(matrix_CC: torch.Tensor, structures: int) -> torch.Tensor:
    """The blocks of each structure with itself, float32 [S, W, W]."""
    width = len(matrix_CC) // structures
    parts = matrix_CC.reshape(structures, width, structures, width)
    return parts.diagonal(dim1=0, dim2=2).permute(2, 0, 1)


def _energies(weight_RC: torch.Tensor, forms_SWW: torch.Tensor) -> torch.Tensor:
    """Σ_rows w_s F_s w_sᵀ of each structure, float64 [S]."""
    structures, width, _ = forms_SWW.shape
    weight_SRW = weight_RC.reshape(-1, structures, width).transpose(0, 1)
    return (torch.bmm(weight_SRW, forms_SWW) * weight_SRW).sum((1, 2), dtype=torch.float64)
