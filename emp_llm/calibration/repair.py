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
    weight_RC: torch.Tensor, keep_RC: torch.Tensor, hessian_CC: torch.Tensor
) -> torch.Tensor:
    """Change the kept weights of a matrix so that its outputs are what they were.

    Sought is, in every row, the v that is zero where nothing is kept and makes

        (w - v)ᵀ (H + λI) (w - v)

    least: the squared error of the outputs over all calibration tokens, and λ times the change of
    the weights. First comes the update of SparseGPT (Frantar & Alistarh, arXiv 2301.00774), with
    its mask given: column by column, in blocks of 128, what a pruned weight takes from the outputs
    is made up for by the columns behind it. As those before it could help as well, 20 steps of the
    method of conjugate gradients follow, for all rows together, on the kept weights only and
    preconditioned by H's diagonal; each lessens the error above. So the result is never worse than
    no repair, but for rounding.

    Args:
        weight_RC: float32 [R, C], the dense weights.
        keep_RC: bool [R, C], which ones stay.
        hessian_CC: float32 [C, C], H = Σ_t x_t x_tᵀ over the tokens that the matrix is multiplied
            by; on the weights' device.

    Returns:
        float32 [R, C], zero where nothing is kept. A row that is kept whole is as it was.
    """
    import torch

    damped_CC, lower_CC = factored(hessian_CC)
    upper_CC, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower_CC), upper=True)
    del lower_CC
    start_RC = weight_RC * keep_RC if failed.item() else _update(weight_RC, keep_RC, upper_CC)
    del upper_CC
    return _refined(weight_RC, keep_RC, damped_CC, start_RC)


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
    weight_RC: torch.Tensor,
    keep_RC: torch.Tensor,
    damped_CC: torch.Tensor,
    start_RC: torch.Tensor,
) -> torch.Tensor:
    """Steps of conjugate gradients from a start, for every row's own system of kept columns."""
    diagonal_C = damped_CC.diagonal()
    found_RC = start_RC
    residual_RC = ((weight_RC - found_RC) @ damped_CC).mul_(keep_RC)
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
