"""Masks that kept and pruned weights of a row are exchanged in while its error falls.

Shapes in names: R rows (outputs) and C columns (inputs) of a matrix, N exchanges at most in a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from emp_llm.calibration.repair import repair_obs

if TYPE_CHECKING:
    from emp_llm.calibration.repair import LeastSquares

__all__ = ["repair_by_swaps"]

_ROUNDS = 5
"""How often weights are exchanged; later rounds win little."""

_SHARE = 0.05
"""The share of a row's kept weights that a round exchanges at most."""

_STEPS = 4
"""Steps of conjugate gradients after an exchange: the solution before it is near."""

_ROWS = 1024
"""Rows at a time, for which some ten matrices are in memory."""


def repair_by_swaps(
    squares: LeastSquares, keep_RC: torch.Tensor, worth_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exchange kept and pruned weights of each row for as long as this lowers its error.

    Without weight c, the error of a solution v rises by about v_c² / [H⁻¹]_cc, and with weight c it
    falls by about g_c² [H⁻¹]_cc, where g = b - v (H + Λ) (the optimal brain surgeon, Hassibi &
    Stork, 1992, and its inverse). In each round the weights that cost least leave, and those that
    win most take their places, up to 5 % of a row, as long as one wins more than the other costs.
    Then the row is solved again. Where the exchanges together are no gain, the row stays as it was,
    and tries half as many in the next round.

    SparseSwaps (Zimmer et al., arXiv 2512.10922) exchanges single weights of a fixed solution; here
    the kept weights adapt to every exchange.

    Args:
        squares: What each row of the matrix is to minimize.
        keep_RC: bool [R, C], the mask to begin with.
        worth_C: float64 [C], 1 / [H⁻¹]_cc.

    Returns:
        keep_RC: bool [R, C]; every row keeps as many weights as before.
        repaired_RC: float32 [R, C], zero where a weight is pruned.
    """
    found = []
    for start in range(0, len(keep_RC), _ROWS):
        some = slice(start, start + _ROWS)
        found.append(_swapped(squares.rows(some), keep_RC[some], worth_C.float()))
    masks, solutions = zip(*found, strict=True)
    return torch.cat(masks), torch.cat(solutions)


def _swapped(
    squares: LeastSquares, keep_RC: torch.Tensor, worth_C: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of some rows, the mask and the kept weights."""
    limit_R = (_SHARE * keep_RC.sum(1)).ceil()
    most = int(limit_R.max())
    solution_RC = repair_obs(squares, keep_RC)
    gradient_RC = squares.gradient(solution_RC)
    error_R = squares.error(solution_RC, gradient_RC)
    for _ in range(_ROUNDS):
        tried_RC = _exchanged(keep_RC, solution_RC, gradient_RC, worth_C, limit_R, most)
        trial_RC = squares.solved(solution_RC * tried_RC, tried_RC, _STEPS)
        trial_gradient_RC = squares.gradient(trial_RC)
        trial_R = squares.error(trial_RC, trial_gradient_RC)
        better_R = trial_R < error_R
        limit_R = torch.where(better_R, limit_R, limit_R / 2)
        error_R = torch.where(better_R, trial_R, error_R)
        better_R1 = better_R.unsqueeze(1)
        keep_RC = torch.where(better_R1, tried_RC, keep_RC)
        solution_RC = torch.where(better_R1, trial_RC, solution_RC)
        gradient_RC = torch.where(better_R1, trial_gradient_RC, gradient_RC)
    return keep_RC, squares.solved(solution_RC, keep_RC)


def _exchanged(
    keep_RC: torch.Tensor,
    solution_RC: torch.Tensor,
    gradient_RC: torch.Tensor,
    worth_C: torch.Tensor,
    limit_R: torch.Tensor,
    most: int,
) -> torch.Tensor:
    """The mask after one round of exchanges, at most `most` in a row."""
    costs_RC = (solution_RC.square() * worth_C).masked_fill_(~keep_RC, torch.inf)
    wins_RC = (gradient_RC.square() / worth_C).nan_to_num_(0.0).masked_fill_(keep_RC, -torch.inf)
    cost_RN, leaving_RN = costs_RC.topk(most, largest=False)
    win_RN, coming_RN = wins_RC.topk(most)
    rank_N = torch.arange(most, device=keep_RC.device)
    pays_RN = (win_RN > cost_RN) & (rank_N < limit_R.unsqueeze(1))
    changed_RC = keep_RC.clone()
    # ranks at the end may lie on weights that cannot leave or come: there no exchange pays
    changed_RC.scatter_(1, leaving_RN, keep_RC.gather(1, leaving_RN) & ~pays_RN)
    return changed_RC.scatter_(1, coming_RN, changed_RC.gather(1, coming_RN) | pays_RN)
