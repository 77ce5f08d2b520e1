"""Σ_t x_t x_tᵀ of a matrix's inputs, damped so that it has an inverse.

Shapes in names: C columns (inputs).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["DAMPING", "dead_columns", "factored"]

DAMPING = 0.01
"""What is added to the diagonal, as a share of its mean (SparseGPT's ``percdamp``)."""

_MORE = 10.0


def dead_columns(hessian_CC: torch.Tensor) -> torch.Tensor:
    """Of inputs, bool [C], which ones were zero at every token."""
    return hessian_CC.diagonal() == 0


def factored(hessian_CC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """H + λI, and its Cholesky factor.

    λ is `DAMPING` times the mean of H's diagonal. Where rounding leaves the sum without a factor,
    λ becomes ten times as much until there is one. Where all inputs were zero, H + λI is the
    identity.

    Args:
        hessian_CC: float32 [C, C], symmetric; finite. It is left as it is.

    Returns:
        damped_CC: float32 [C, C], H + λI.
        lower_CC: float32 [C, C], the lower triangular L with L Lᵀ = H + λI.
    """
    import torch

    damped_CC = hessian_CC.clone()
    diagonal_C = damped_CC.diagonal()
    mean = hessian_CC.diagonal().double().mean().item()
    damping = DAMPING * mean if mean > 0 else 1.0
    while True:
        diagonal_C.copy_(hessian_CC.diagonal()).add_(damping)
        lower_CC, failed = torch.linalg.cholesky_ex(damped_CC)
        if not failed.item():
            return damped_CC, lower_CC
        damping *= _MORE
