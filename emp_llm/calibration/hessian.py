"""Σ_t x_t x_tᵀ of a matrix's inputs, damped so that it has an inverse.

Shapes in names: C columns (inputs).
"""

from __future__ import annotations

import math
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


def factored(hessian_CC: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The Cholesky factor of H + λI, and λ.

    λ is `DAMPING` times the mean of H's diagonal. Where rounding leaves the sum without a factor,
    λ becomes ten times as much until there is one. Where all inputs were zero, λ is 1. Beside H no
    other matrix of its size than the factor is in memory.

    Args:
        hessian_CC: float32 [C, C], symmetric; finite. It is left as it is.

    Returns:
        lower_CC: float32 [C, C], the lower triangular L with L Lᵀ = H + λI, column by column in
            memory.
        damping: λ.

    Raises:
        ValueError: If it is not finite.
    """
    import torch

    mean = hessian_CC.diagonal().double().mean().item()
    if not math.isfinite(hessian_CC.sum(dtype=torch.float64).item()):
        raise ValueError("the Hessian holds NaN or infinity")
    damping = DAMPING * mean if mean > 0 else 1.0
    lower_CC = torch.empty_like(hessian_CC, memory_format=torch.contiguous_format).mT
    failed = torch.empty((), dtype=torch.int32, device=hessian_CC.device)
    while True:
        lower_CC.copy_(hessian_CC).diagonal().add_(damping)
        torch.linalg.cholesky_ex(lower_CC, out=(lower_CC, failed))
        if not failed.item():
            return lower_CC, damping
        damping *= _MORE
