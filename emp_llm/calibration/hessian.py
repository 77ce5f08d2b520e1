"""H = Σ_t x_t x_tᵀ of a matrix's inputs, damped so that it has an inverse.

Up to a factor, H is the Hessian of the squared error of each output with respect to the weights of
its row (SparseGPT, Frantar & Alistarh, arXiv 2301.00774).

Shapes in names: T tokens, C columns (inputs).
"""

from __future__ import annotations

import math
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

__all__ = ["DAMPING", "Worth", "add_squares", "damping", "dead_columns", "factored", "mirror"]

DAMPING = 0.01
"""What is added to the diagonal, relative to its mean (SparseGPT's ``percdamp``)."""

_GROWTH = 10.0
"""Factor of the damping where it was too little."""

_LEAST_PART, _PARTS = 256, 8
"""Columns in a part of H: at least the first number, and at most one part more than the second."""


def add_squares(hessian_CC: torch.Tensor, x_TC: torch.Tensor) -> None:
    """Add Σ_t x_t x_tᵀ to H, but for what lies above the parts on the diagonal.

    H is symmetric, so that nearly half of it need not be computed; `mirror` fills it in.

    Args:
        hessian_CC: float32 [C, C]; changed.
        x_TC: float32 [T, C].
    """
    for part in _parts(len(hessian_CC)):
        hessian_CC[part.start :, part].addmm_(x_TC[:, part.start :].T, x_TC[:, part])


def mirror(hessian_CC: torch.Tensor) -> None:
    """Fill in, in place, what `add_squares` leaves out."""
    for part in _parts(len(hessian_CC)):
        hessian_CC[part, part.stop :] = hessian_CC[part.stop :, part].T


def _parts(columns: int) -> Iterator[slice]:
    step = max(_LEAST_PART, columns // _PARTS)
    for start in range(0, columns, step):
        yield slice(start, min(start + step, columns))


def dead_columns(hessian_CC: torch.Tensor) -> torch.Tensor:
    """Which inputs were zero at every token, bool [C]."""
    return hessian_CC.diagonal() == 0


def damping(hessian_CC: torch.Tensor, share: float) -> float:
    """λ: a share of the mean of H's diagonal, or 1 where all inputs were zero."""
    mean = hessian_CC.diagonal().double().mean().item()
    return share * mean if mean > 0 else 1.0


def factored(hessian_CC: torch.Tensor, share: float = DAMPING) -> tuple[torch.Tensor, float]:
    """The Cholesky factor of H + λI, and λ, which is a share of the mean of H's diagonal.

    Where rounding leaves H + λI not positive definite, λ is multiplied by ten until it is. Besides
    H, only the factor is in memory: for 14,336 inputs, each takes 822 MB.

    Args:
        hessian_CC: float32 [C, C], symmetric, finite; not changed.
        share: The share, above 0.

    Returns:
        lower_CC: float32 [C, C], the lower triangular L with L Lᵀ = H + λI, in column-major order.
        damping: λ.

    Raises:
        ValueError: If H is not finite.
    """
    import torch

    if not math.isfinite(hessian_CC.sum(dtype=torch.float64).item()):
        raise ValueError("the Hessian holds NaN or infinity")
    added = damping(hessian_CC, share)
    # column-major, as LAPACK has it: torch factors such a matrix in place, without a copy
    lower_CC = torch.empty_like(hessian_CC, memory_format=torch.contiguous_format).mT
    failed = torch.empty((), dtype=torch.int32, device=hessian_CC.device)
    while True:
        lower_CC.copy_(hessian_CC).diagonal().add_(added)
        torch.linalg.cholesky_ex(lower_CC, out=(lower_CC, failed))
        if not failed.item():
            return lower_CC, added
        added *= _GROWTH


class Worth:
    """1 / [(H + λI)⁻¹]_cc of each column: by how much an error rises without w_c = 1.

    Remembers those of the last Hessian: projections that share their inputs, as gate and up, come
    one after the other.
    """

    def __init__(self) -> None:
        self._hessian: Callable[[], torch.Tensor | None] = lambda: None

    def __call__(self, hessian_CC: torch.Tensor) -> torch.Tensor:
        """Those of a Hessian, with `factored`'s damping.

        Args:
            hessian_CC: float32 [C, C], symmetric, finite; not changed.

        Returns:
            float64 [C]; 0 where the input was always zero.

        Raises:
            ValueError: If H is not finite.
        """
        import torch

        if self._hessian() is not hessian_CC:
            factor_CC, _ = factored(hessian_CC)
            # the inverse takes the factor's place in memory
            inverse_C = torch.cholesky_inverse(factor_CC, out=factor_CC).diagonal().double()
            self._worth_C = torch.where(dead_columns(hessian_CC), 0.0, 1.0 / inverse_C)
            self._hessian = weakref.ref(hessian_CC)
        return self._worth_C
