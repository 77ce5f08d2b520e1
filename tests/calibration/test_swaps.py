"""Exchanged weights against the exact least squares of every mask that one exchange can make."""

import itertools

import numpy as np
import pytest
import torch

from emp_llm.calibration.hessian import Worth
from emp_llm.calibration.repair import LeastSquares, repair_obs
from emp_llm.calibration.swaps import repair_by_swaps

R, C, T = 40, 24, 200


@pytest.fixture
def squares() -> LeastSquares:
    """Inputs of which half depend on the other half, and the same inputs of a dense model."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(T, C, generator=generator)
    x[:, : C // 2] += 1.5 * x[:, C // 2 :]
    dense = x + 0.2 * torch.randn(T, C, generator=generator)
    weight = torch.randn(R, C, generator=generator)
    return LeastSquares.of(weight, x.T @ x, (dense - x).T @ x, tokens=T)


@pytest.fixture
def keep(squares: LeastSquares) -> torch.Tensor:
    """From one weight in the first row to all in the last ones."""
    count = torch.arange(1, R + 1).clamp(max=C).unsqueeze(1)
    order = squares.weight_RC.abs().argsort(1, descending=True).argsort(1)
    return order < count


def least_error(squares: LeastSquares, row: int, kept: np.ndarray) -> float:
    """Of the best values of some kept weights, by a direct solution in float64."""
    damped = squares.damped_CC.double().numpy()
    weight = squares.weight_RC[row].double().numpy()
    assert squares.shift_RC is not None
    b = weight @ damped + squares.shift_RC[row].double().numpy()
    best = np.zeros(C)
    best[kept] = np.linalg.solve(damped[np.ix_(kept, kept)], b[kept])
    return float(best @ damped @ best - 2 * b @ best)


def test_rows_keep_as_many_and_no_row_is_worse(squares: LeastSquares, keep: torch.Tensor) -> None:
    worth = Worth()(squares.damped_CC)
    given = keep.clone()

    swapped, repaired = repair_by_swaps(squares, keep, worth)

    assert torch.equal(keep, given)
    assert torch.equal(swapped.sum(1), keep.sum(1))
    assert not repaired[~swapped].any()
    before = [least_error(squares, row, given[row].numpy()) for row in range(R)]
    after = [least_error(squares, row, swapped[row].numpy()) for row in range(R)]
    assert all(b <= a + 1e-3 * abs(a) for a, b in zip(before, after, strict=True))
    changed = (swapped != given).any(1)
    assert changed[:C].sum() > 10
    assert sum(a - b for a, b in zip(before, after, strict=True)) > 0


def test_the_weights_are_those_that_belong_to_the_mask(
    squares: LeastSquares, keep: torch.Tensor
) -> None:
    swapped, repaired = repair_by_swaps(squares, keep, Worth()(squares.damped_CC))

    for row in range(R):
        v = repaired[row].double().numpy()
        damped = squares.damped_CC.double().numpy()
        weight = squares.weight_RC[row].double().numpy()
        assert squares.shift_RC is not None
        b = weight @ damped + squares.shift_RC[row].double().numpy()
        found = float(v @ damped @ v - 2 * b @ v)
        least = least_error(squares, row, swapped[row].numpy())
        assert found == pytest.approx(least, rel=1e-4)


def test_rows_that_end_near_the_best_single_exchange(
    squares: LeastSquares, keep: torch.Tensor
) -> None:
    """Five rounds take most of what the best single exchange after another would."""
    swapped, _ = repair_by_swaps(squares, keep, Worth()(squares.damped_CC))
    for row in (7, 11, 15):
        kept = keep[row].numpy()
        error = first = least_error(squares, row, kept)
        for _ in range(5):  # greedily, every pair tried
            trials = []
            for leaving, coming in itertools.product(*(np.flatnonzero(m) for m in (kept, ~kept))):
                trial = kept.copy()
                trial[[leaving, coming]] = False, True
                trials.append((least_error(squares, row, trial), leaving, coming))
            best, leaving, coming = min(trials)
            if best >= error:
                break
            error = best
            kept[[leaving, coming]] = False, True
        assert first - least_error(squares, row, swapped[row].numpy()) >= 0.5 * (first - error)


def test_the_error_is_that_of_the_outputs_up_to_a_constant(squares: LeastSquares) -> None:
    generator = torch.Generator().manual_seed(6)
    one, other = (torch.randn(R, C, generator=generator) for _ in range(2))

    difference = squares.error(one, squares.gradient(one)) - squares.error(
        other, squares.gradient(other)
    )

    A = squares.damped_CC.double()
    assert squares.shift_RC is not None
    b = squares.weight_RC.double() @ A + squares.shift_RC.double()

    def error(v: torch.Tensor) -> torch.Tensor:
        return ((v.double() @ A) * v.double()).sum(1) - 2 * (b * v.double()).sum(1)

    torch.testing.assert_close(difference.double(), error(one) - error(other), rtol=1e-4, atol=1e-2)


def test_where_all_is_kept_nothing_changes(squares: LeastSquares) -> None:
    keep = torch.ones(R, C, dtype=torch.bool)

    swapped, repaired = repair_by_swaps(squares, keep, Worth()(squares.damped_CC))

    assert swapped.all()
    exact = repair_obs(squares, keep)
    torch.testing.assert_close(repaired, exact, rtol=1e-2, atol=1e-2)
