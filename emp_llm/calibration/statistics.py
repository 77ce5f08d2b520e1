"""The statistics of one matrix that calibration gathers: norms, means, Hessian or gradient.

Shapes in names: T tokens, R rows (outputs) and C columns (inputs) of the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from emp_llm.tensors.target import Target

    StatisticsOf = Callable[[Target, int], "Statistics"]
    """Returns the statistics of a matrix of a target, by its number."""

__all__ = ["Need", "Statistics", "StatisticsOf"]

Need = Literal["norms", "means", "hessian", "gradient"]
"""What a criterion or a repair can ask calibration to gather."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Statistics:
    """What is known of one matrix [R, C] besides its weights; only what was asked for is there.

    Attributes:
        tensor: Name of the checkpoint's tensor.
        matrix: Number of the matrix in it; 0 except in stacks of experts.
        first_row: Number of the matrix's first row among all rows of the tensor.
        seed: The calibration's seed, for criteria that draw random numbers.
        tokens: T, how many inputs x_t the matrix was multiplied by.
        norms_C: float64 [C], ‖x_c‖₂ of each input over all tokens.
        means_C: float64 [C], the mean of each input over all tokens.
        hessian_CC: float32 [C, C], Σ_t x_t x_tᵀ.
        gap_CC: float32 [C, C], Σ_t (d_t - x_t) x_tᵀ, where d_t is the input that the dense model
            has in place of x_t.
        gradient_RC: float32 [R, C], ∂L/∂w of the mean loss L in nats per token.
    """

    tensor: str
    matrix: int = 0
    first_row: int = 0
    seed: int = 0
    tokens: int = 0
    norms_C: torch.Tensor | None = None
    means_C: torch.Tensor | None = None
    hessian_CC: torch.Tensor | None = None
    gap_CC: torch.Tensor | None = None
    gradient_RC: torch.Tensor | None = None
