"""Repaired weights against the exact least squares of each row, and biases."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from emp_llm import keep_mask
from emp_llm.calibration.hessian import factored
from emp_llm.calibration.repair import LeastSquares, bias_change
from emp_llm.calibration.repair import repair_obs as repair

R, C, T = 8, 150, 250


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(R, C, generator=torch.Generator().manual_seed(1)) * 0.02


@pytest.fixture
def inputs() -> torch.Tensor:
    """Inputs that depend on each other: a third of the directions hold most of them."""
    generator = torch.Generator().manual_seed(2)
    shared = torch.randn(T, C // 3, generator=generator) @ torch.randn(
        C // 3, C, generator=generator
    )
    return shared + 2 * torch.randn(T, C, generator=generator)


def repair_obs(
    weight: torch.Tensor, keep: torch.Tensor, *statistics: torch.Tensor, tokens: int
) -> torch.Tensor:
    return repair(LeastSquares.of(weight, *statistics, tokens=tokens), keep)


def squares(inputs: torch.Tensor) -> torch.Tensor:
    return (inputs.double().T @ inputs.double()).float()


def as_float64(tensor: torch.Tensor) -> Any:
    return tensor.double().numpy()


def damping(inputs: torch.Tensor) -> Any:
    """The share C / T of each sum of squares, or 0.3 if this is more, and 1 % of their mean."""
    squares = (as_float64(inputs) ** 2).sum(0)
    return max(0.3, C / len(inputs)) * squares + 0.01 * squares.mean()


def equations(inputs: torch.Tensor, of: torch.Tensor) -> Any:
    """Those of least squares; the damping is one more for each weight."""
    return np.vstack([as_float64(inputs), np.diag(damping(of) ** 0.5)])


def error(weight: torch.Tensor, changed: Any, inputs: torch.Tensor, dense: torch.Tensor) -> Any:
    """Of each row, the squared error of its outputs and the damped squared change."""
    wanted = equations(dense, inputs) @ as_float64(weight).T
    got = equations(inputs, inputs) @ np.asarray(changed, np.float64).T
    return ((wanted - got) ** 2).sum(0)


def exact(
    weight: torch.Tensor, keep: torch.Tensor, inputs: torch.Tensor, dense: torch.Tensor
) -> Any:
    """Row by row with numpy.linalg.lstsq."""
    best = np.zeros((R, C))
    for row in range(R):
        kept = keep[row].numpy()
        wanted = equations(dense, inputs) @ as_float64(weight[row])
        matrix = equations(inputs, inputs)
        best[row, kept] = np.linalg.lstsq(matrix[:, kept], wanted, rcond=None)[0]
    return best


@pytest.mark.parametrize("beta", [0.4, 1.0])
def test_repaired_rows_are_all_but_the_least_squares_of_each(
    weight: torch.Tensor, inputs: torch.Tensor, beta: float
) -> None:
    keep = keep_mask(weight.abs(), beta=beta)

    repaired = repair_obs(weight, keep, squares(inputs), tokens=T)

    assert (repaired.dtype, repaired.shape) == (torch.float32, (R, C))
    assert not repaired[~keep].any()
    best = error(weight, exact(weight, keep, inputs, inputs), inputs, inputs)
    found = error(weight, repaired, inputs, inputs)
    assert (found < 1.01 * best).all()
    assert (best < 0.9 * error(weight, weight * keep, inputs, inputs)).all()


def test_it_aims_a_quarter_of_the_way_at_the_outputs_that_the_dense_inputs_gave(
    weight: torch.Tensor, inputs: torch.Tensor
) -> None:
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(3))
    dense = 1.1 * inputs + 6 * noise
    keep = keep_mask(weight.abs(), beta=0.75)
    keep[2] = True
    gap = ((as_float64(dense) - as_float64(inputs)).T @ as_float64(inputs)).astype(np.float32)

    repaired = repair_obs(weight, keep, squares(inputs), torch.from_numpy(gap), tokens=T)

    assert not repaired[~keep].any()
    between = inputs + (dense - inputs) / 4
    best = error(weight, exact(weight, keep, inputs, between), inputs, between)
    assert (error(weight, repaired, inputs, between) < 1.01 * best).all()
    for other in (inputs, (dense + inputs) / 2, dense):
        off = error(weight, exact(weight, keep, inputs, other), inputs, between)
        assert (best < 0.99 * off).all()


def test_the_damping_depends_on_the_number_of_tokens_only_if_they_are_few(
    weight: torch.Tensor, inputs: torch.Tensor
) -> None:
    keep, hessian = keep_mask(weight.abs()), squares(inputs)
    many, more, few = (
        repair_obs(weight, keep, hessian, tokens=tokens) for tokens in (4 * C, 8 * C, 2 * C)
    )
    assert torch.equal(many, more)
    assert (few - weight * keep).norm() < (many - weight * keep).norm()


def test_dense_inputs_that_are_the_inputs_change_nothing(
    weight: torch.Tensor, inputs: torch.Tensor
) -> None:
    keep, hessian = keep_mask(weight.abs()), squares(inputs)

    assert torch.equal(
        repair_obs(weight, keep, hessian, torch.zeros_like(hessian), tokens=T),
        repair_obs(weight, keep, hessian, tokens=T),
    )


def test_no_row_is_worse_than_without_repair(weight: torch.Tensor, inputs: torch.Tensor) -> None:
    keep = keep_mask(torch.rand(R, C, generator=torch.Generator().manual_seed(4)), beta=0.5)
    few = inputs[: C // 2]  # H has no inverse

    repaired = repair_obs(weight, keep, squares(few), tokens=len(few))

    unrepaired = error(weight, weight * keep, few, few)
    assert (error(weight, repaired, few, few) <= unrepaired).all()
    assert torch.isfinite(repaired).all()


def test_inputs_that_do_not_depend_on_each_other_leave_kept_weights_as_they_are(
    weight: torch.Tensor,
) -> None:
    keep = keep_mask(weight.abs())
    hessian = torch.diag(torch.linspace(0.5, 9, C))

    repaired = repair_obs(weight, keep, hessian, tokens=T)

    torch.testing.assert_close(repaired, weight * keep, rtol=1e-6, atol=0)


@pytest.mark.parametrize("tokens", [0, 1])
def test_rows_that_are_kept_whole_and_rows_that_are_not_kept_stay_so(
    weight: torch.Tensor, inputs: torch.Tensor, tokens: int
) -> None:
    keep = keep_mask(weight.abs())
    keep[3], keep[7] = True, False

    for hessian in (squares(inputs), squares(inputs[:tokens])):
        repaired = repair_obs(weight, keep, hessian, tokens=T)
        assert torch.equal(repaired[3], weight[3])
        assert not repaired[7].any()


def test_weights_of_inputs_that_are_always_zero_stay_as_they_are(
    weight: torch.Tensor, inputs: torch.Tensor
) -> None:
    inputs[:, 70] = 0
    keep = keep_mask(weight.abs())

    repaired = repair_obs(weight, keep, squares(inputs), tokens=T)

    torch.testing.assert_close(repaired[:, 70], weight[:, 70] * keep[:, 70])


def test_an_input_that_is_another_one_is_made_up_for_by_it() -> None:
    x = torch.randn(500, 1, generator=torch.Generator().manual_seed(5))
    inputs = torch.cat([x, 2 * x], 1)
    keep = torch.tensor([[True, False], [False, True]])

    repaired = repair_obs(torch.tensor([[3.0, 1.0], [3.0, 1.0]]), keep, squares(inputs), tokens=500)

    # 3x + 1·2x = 5x, of either alone; the damping takes a part of what is added: of the squares
    # 1, 4 and their mean 2.5, 1 / (1.3 + 0.025) and 4 / (5.2 + 0.025) are left of 2x and 3x
    expected = torch.tensor([[3 + 2 / 1.325, 0], [0, 1 + 1.5 * 4 / 5.225]])
    torch.testing.assert_close(repaired, expected, rtol=1e-5, atol=0)


def test_repairing_changes_neither_arguments_nor_bits(
    weight: torch.Tensor, inputs: torch.Tensor
) -> None:
    keep, hessian = keep_mask(weight.abs()), squares(inputs)
    before = weight.clone(), keep.clone(), hessian.clone()

    first, second = (repair_obs(weight, keep, hessian, tokens=T) for _ in range(2))

    assert torch.equal(first, second)
    for argument, copy in zip((weight, keep, hessian), before, strict=True):
        assert torch.equal(argument, copy)


def test_the_bias_makes_up_for_the_means_of_the_outputs(
    weight: torch.Tensor, inputs: torch.Tensor
) -> None:
    shifted = as_float64(inputs) + np.linspace(-1, 1, C)
    pruned = weight * keep_mask(weight.abs())

    change = bias_change(weight, pruned, torch.from_numpy(shifted.mean(0)))

    assert (change.dtype, change.shape) == (torch.float64, (R,))
    means = [(shifted @ as_float64(which).T).mean(0) for which in (weight, pruned)]
    np.testing.assert_allclose(means[1] + change.numpy(), means[0], rtol=1e-12, atol=1e-14)


def test_a_hessian_that_is_not_finite_is_refused():
    hessian_CC = torch.eye(3)
    hessian_CC[1, 1] = math.inf

    with pytest.raises(ValueError, match="NaN or infinity"):
        factored(hessian_CC)
