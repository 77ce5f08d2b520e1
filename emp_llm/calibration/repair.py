"""Kept weights, and biases, that restore what a pruned matrix gives on the calibration data.

Shapes in names: R rows (outputs) and C columns (inputs) of a matrix, B columns of a block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from emp_llm.calibration.hessian import factored

if TYPE_CHECKING:
    import torch

__all__ = ["bias_change", "repair_obs"]

_BLOCK = 128
_STEPS = 20


def repair_obs(
    weight_RC: torch.Tensor,
    keep_RC: torch.Tensor,
    hessian_CC: torch.Tensor,
    cross_CC: torch.Tensor | None = None,
) -> torch.Tensor:
    """Change the kept weights of a matrix so that its outputs are what they were.

    Sought is, in every row w, the v that is zero where nothing is kept and makes

        Σ_t (w · d_t - v · x_t)² + λ ‖w - v‖²

    least, where x_t are the matrix's inputs now, d_t those that it had in the dense model, and λ is
    1 % of the mean of H's diagonal. Aiming at the dense outputs makes up for errors of the layers
    before as well (GPTAQ, Li et al., arXiv 2504.02692). Without `cross_CC`, d_t is x_t.

    First comes the update of SparseGPT (Frantar & Alistarh, arXiv 2301.00774), with its mask given:
    column by column, in blocks of 128, what a pruned weight takes from the outputs is made up for
    by the columns behind it. As those before it could help as well, 20 steps of the method of
    conjugate gradients follow, for all rows together, on the kept weights only and preconditioned
    by H's diagonal. Each lessens the sum above, which comes within 1 % of its least for inputs as
    layers have them.

    Args:
        weight_RC: float32 [R, C], the dense weights.
        keep_RC: bool [R, C], which ones stay.
        hessian_CC: float32 [C, C], H = Σ_t x_t x_tᵀ.
        cross_CC: float32 [C, C], Σ_t d_t x_tᵀ: rows are of the dense inputs.

    Returns:
        float32 [R, C], zero where nothing is kept. Without `cross_CC`, a row that is kept whole
        stays as it was.
    """
    import torch

    lower_CC, damping = factored(hessian_CC)
    shift_RC = None if cross_CC is None else weight_RC @ (cross_CC - hessian_CC)
    target_RC = weight_RC
    if shift_RC is not None:  # the best v if all weights were kept
        target_RC = weight_RC + torch.cholesky_solve(shift_RC.T, lower_CC).T
    upper_CC = torch.cholesky_inverse(lower_CC, out=lower_CC)  # all in the same memory
    failed = torch.empty((), dtype=torch.int32, device=upper_CC.device)
    torch.linalg.cholesky_ex(upper_CC, upper=True, out=(upper_CC, failed))
    del lower_CC
    start_RC = weight_RC * keep_RC if failed.item() else _update(target_RC, keep_RC, upper_CC)
    del upper_CC, target_RC
    damped_CC = hessian_CC.clone()
    damped_CC.diagonal().add_(damping)
    residual_RC = (weight_RC - start_RC) @ damped_CC
    if shift_RC is not None:
        residual_RC += shift_RC
    return _refined(start_RC, residual_RC.mul_(keep_RC), keep_RC, damped_CC)


def _update(weight_RC: torch.Tensor, keep_RC: torch.Tensor, upper_CC: torch.Tensor) -> torch.Tensor:
    """The update of SparseGPT; upper_CC is U with Uᵀ U = (H + λI)⁻¹."""
    import torch

    updated_RC = weight_RC.clone(memory_format=torch.contiguous_format)
    columns = weight_RC.shape[1]
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        errors_RB = updated_RC.new_zeros(len(updated_RC), end - start)
        for column in range(start, end):
            pruned_R = ~keep_RC[:, column] * updated_RC[:, column]
            error_R = errors_RB[:, column - start]
            error_R.copy_(pruned_R / upper_CC[column, column])
            updated_RC[:, column:end].addr_(error_R, upper_CC[column, column:end], alpha=-1)
        updated_RC[:, end:].addmm_(errors_RB, upper_CC[start:end, end:], alpha=-1)
    return updated_RC.mul_(keep_RC)


def _refined(
    found_RC: torch.Tensor,
    residual_RC: torch.Tensor,
    keep_RC: torch.Tensor,
    damped_CC: torch.Tensor,
) -> torch.Tensor:
    """Steps of conjugate gradients from a start and what it leaves, each row's own system."""
    diagonal_C = damped_CC.diagonal()
    step_RC = residual_RC / diagonal_C
    product_R1 = (residual_RC * step_RC).sum(1, keepdim=True)
    for _ in range(_STEPS):
        image_RC = (step_RC @ damped_CC).mul_(keep_RC)
        length_R1 = _ratio(product_R1, (step_RC * image_RC).sum(1, keepdim=True))
        found_RC.addcmul_(length_R1, step_RC)
        residual_RC.addcmul_(length_R1, image_RC, value=-1)
        ahead_RC = residual_RC / diagonal_C
        last_R1, product_R1 = product_R1, (residual_RC * ahead_RC).sum(1, keepdim=True)
        step_RC = step_RC.mul_(_ratio(product_R1, last_R1)).add_(ahead_RC)
    return found_RC


def _ratio(over_R1: torch.Tensor, under_R1: torch.Tensor) -> torch.Tensor:
    """The quotient, 0 where nothing is left to divide by."""
    import torch

    return torch.where(under_R1 > 0, over_R1 / under_R1, 0.0)


def bias_change(
    dense_RC: torch.Tensor, pruned_RC: torch.Tensor, means_C: torch.Tensor
) -> torch.Tensor:
    """What to add to a bias so that the means of the outputs are what they were.

    Args:
        dense_RC: float32 [R, C], the weights as they were.
        pruned_RC: float32 [R, C], as they are now.
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
