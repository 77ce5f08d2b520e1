"""Repair: new weights or biases that restore a pruned matrix's outputs on the calibration data.

Shapes in names: R rows (outputs) and C columns (inputs) of a matrix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from emp_llm.calibration.hessian import DAMPING, damping

if TYPE_CHECKING:
    import torch

__all__ = ["LeastSquares", "bias_change", "repair_obs"]

_PROPAGATION = 0.25
"""Which share of the errors of the layers before is compensated."""

_RIDGE = 0.3
"""λ_c is at least this share of each diagonal entry of H."""

_STEPS = 8
"""Steps of conjugate gradients: of an LLM, that many come within 1.4 % of the minimum."""


@dataclass(frozen=True)
class LeastSquares:
    """What every row w of a matrix is to minimize by its kept weights v.

        Σ_t (w · (x_t + (d_t - x_t) / 4) - v · x_t)² + Σ_c λ_c (w_c - v_c)²,

    where x_t is an input of the matrix in the pruned model, and d_t the same input in the dense
    model. Aiming at the outputs w · d_t of the dense model compensates errors of the layers before
    as well (GPTAQ, Li et al., arXiv 2504.02692), but follows the calibration text too closely: on
    other text, a quarter of the way is better (the propagation strength of QEP, Arai and Ichikawa,
    arXiv 2504.09629).

    That is a system of the kept weights alone, (H + Λ)_KK v_K = b_K, in every row (the optimal
    brain surgeon for a whole mask, Hassibi & Stork, 1992), with Λ = diag(λ),
    b = w (H + Λ) + w G / 4 and G = Σ_t (d_t - x_t) x_tᵀ.

    Attributes:
        weight_RC: float32 [R, C], the dense weights w.
        damped_CC: float32 [C, C], H + Λ, where H = Σ_t x_t x_tᵀ.
        shift_RC: float32 [R, C], w G / 4; None if d_t is x_t.
    """

    weight_RC: torch.Tensor
    damped_CC: torch.Tensor
    shift_RC: torch.Tensor | None

    @classmethod
    def of(
        cls,
        weight_RC: torch.Tensor,
        hessian_CC: torch.Tensor,
        gap_CC: torch.Tensor | None = None,
        *,
        tokens: int | None,
    ) -> LeastSquares:
        """From the statistics of a matrix.

        λ_c is a share of H_cc, and 1 % of the mean of H's diagonal. The share is 0.3, or C / T if
        this is more: the fewer tokens there are for each input, the more a fit follows these tokens
        and not the text. Ridge regression of inputs of unit variance (Hoerl & Kennard, 1970): what
        inputs have in common counts less, and differs most from one kind of text to another.

        Args:
            weight_RC: float32 [R, C], the dense weights.
            hessian_CC: float32 [C, C], H = Σ_t x_t x_tᵀ.
            gap_CC: float32 [C, C], G: its rows belong to the differences. Without it, d_t is x_t.
            tokens: T, 1 or more; None for the 1 % alone.
        """
        damped_CC = hessian_CC.clone()
        share = 0.0 if tokens is None else max(_RIDGE, len(hessian_CC) / tokens)
        damped_CC.diagonal().mul_(1 + share).add_(damping(hessian_CC, DAMPING))
        shift_RC = None
        if gap_CC is not None:
            shift_RC = (weight_RC @ gap_CC).mul_(_PROPAGATION)
        return cls(weight_RC, damped_CC, shift_RC)

    def rows(self, some: slice) -> LeastSquares:
        """Those of some rows."""
        shift_RC = None if self.shift_RC is None else self.shift_RC[some]
        return LeastSquares(self.weight_RC[some], self.damped_CC, shift_RC)

    def gradient(self, solution_RC: torch.Tensor) -> torch.Tensor:
        """The residual b - v (H + Λ), float32 [R, C]: minus half the gradient of the sums."""
        gradient_RC = (self.weight_RC - solution_RC) @ self.damped_CC
        return gradient_RC if self.shift_RC is None else gradient_RC.add_(self.shift_RC)

    def error(self, solution_RC: torch.Tensor, gradient_RC: torch.Tensor) -> torch.Tensor:
        """The sum above of each row, float32 [R], but for a part that depends on w alone.

        With u = w - v and s = w G / 4, it is u (H + Λ) uᵀ + 2 u · s.

        Args:
            solution_RC: v.
            gradient_RC: Its `gradient`, u (H + Λ) + s.
        """
        if self.shift_RC is not None:
            gradient_RC = gradient_RC + self.shift_RC
        return ((self.weight_RC - solution_RC) * gradient_RC).sum(1)

    def solved(
        self, start_RC: torch.Tensor, keep_RC: torch.Tensor, steps: int = _STEPS
    ) -> torch.Tensor:
        """Steps of conjugate gradients (Hestenes & Stiefel, 1952), for each row its own.

        Rows differ in which weights are kept. Multiplying by the whole matrix and masking the
        result is the same as multiplying by the rows and columns of kept weights, as long as the
        masked entries of steps and residuals are zero; so one product of matrices serves all rows.
        Steps are preconditioned by the diagonal, and each one lessens a row's sum.

        Args:
            start_RC: float32 [R, C], where to start: zero where a weight is pruned.
            keep_RC: bool [R, C], which weights stay.
            steps: How many.

        Returns:
            float32 [R, C], zero where a weight is pruned.
        """
        import torch

        solution_RC = start_RC.clone()
        kept_RC = keep_RC.to(start_RC.dtype)
        residual_RC = self.gradient(start_RC).mul_(kept_RC)
        inverse_C = self.damped_CC.diagonal().reciprocal()
        ahead_RC = residual_RC * inverse_C
        step_RC, image_RC = ahead_RC.clone(), torch.empty_like(ahead_RC)
        product_R1 = torch.mul(residual_RC, ahead_RC, out=image_RC).sum(1, keepdim=True)
        # in place throughout: new memory in each step would take longer than what is computed in it
        for _ in range(steps):
            torch.mm(step_RC, self.damped_CC, out=image_RC).mul_(kept_RC)
            curvature_R1 = torch.mul(step_RC, image_RC, out=ahead_RC).sum(1, keepdim=True)
            length_R1 = _ratio(product_R1, curvature_R1)
            solution_RC.addcmul_(length_R1, step_RC)
            residual_RC.addcmul_(length_R1, image_RC, value=-1)
            torch.mul(residual_RC, inverse_C, out=ahead_RC)
            last_R1 = product_R1
            product_R1 = torch.mul(residual_RC, ahead_RC, out=image_RC).sum(1, keepdim=True)
            step_RC.mul_(_ratio(product_R1, last_R1)).add_(ahead_RC)
        return solution_RC


def repair_obs(squares: LeastSquares, keep_RC: torch.Tensor) -> torch.Tensor:
    """Change the kept weights of a matrix so that its outputs come close to the dense model's.

    8 steps of conjugate gradients begin at the dense weights under the mask. Of an LLM they come
    within 1.4 % of the minimum, of which the beginning is 50 to 170 % away; further steps predict
    text no better.

    Args:
        squares: What each row is to minimize.
        keep_RC: bool [R, C], which weights stay.

    Returns:
        float32 [R, C], zero where a weight is pruned. Without dense inputs, a row that is kept
        whole stays as it is.
    """
    return squares.solved(squares.weight_RC * keep_RC, keep_RC)


def _ratio(over_R1: torch.Tensor, under_R1: torch.Tensor) -> torch.Tensor:
    """The quotient; 0 where the divisor is 0, for a row that is solved exactly stays as it is."""
    import torch

    return torch.where(under_R1 > 0, over_R1 / under_R1, 0.0)


def bias_change(
    dense_RC: torch.Tensor, pruned_RC: torch.Tensor, means_C: torch.Tensor
) -> torch.Tensor:
    """What to add to a bias so that the mean of each output stays what it is.

    Args:
        dense_RC: float32 [R, C], the weights before pruning.
        pruned_RC: float32 [R, C], the weights after pruning.
        means_C: float64 [C], the mean of each input over the calibration tokens.

    Returns:
        float64 [R], (dense - pruned) · means.
    """
    import torch

    change_R = torch.empty(len(dense_RC), dtype=torch.float64, device=dense_RC.device)
    step = max(1, (1 << 22) // max(1, dense_RC.shape[1]))  # float64 of a few rows at a time
    for start in range(0, len(dense_RC), step):
        some = slice(start, start + step)
        change_R[some] = (dense_RC[some].double() - pruned_RC[some].double()) @ means_C
    return change_R
