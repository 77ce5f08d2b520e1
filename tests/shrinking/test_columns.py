"""Structures that stay, and the new weights of what reads them, against explicit least squares."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from emp_llm.calibration.repair import LeastSquares
from emp_llm.shrinking.columns import columns_of, contributions, least_error, refitted

R, C, T = 7, 24, 300


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def weight() -> torch.Tensor:
    return drawn(1, R, C)


@pytest.fixture
def inputs() -> torch.Tensor:
    """Inputs that depend on each other, some ten times as large as others."""
    sizes = torch.logspace(-0.5, 0.5, C)[
        torch.randperm(C, generator=torch.Generator().manual_seed(4))
    ]
    return (drawn(2, T, C // 3) @ drawn(3, C // 3, C) + 0.5 * drawn(5, T, C)) * sizes


def least_squares(
    weight: torch.Tensor, inputs: torch.Tensor, dense: torch.Tensor | None = None
) -> LeastSquares:
    gap = None if dense is None else (dense - inputs).T @ inputs
    return LeastSquares.of(weight, inputs.T @ inputs, gap, tokens=T)


def plain(
    weight: torch.Tensor, inputs: torch.Tensor, kept: Any, dense: torch.Tensor | None = None
) -> tuple[Any, float]:
    """The best weights of kept columns, by torch's lstsq in float64, and the sum of all squares.

    The damping, 0.3 of each square and 1 % of their mean, is one more equation for each weight.
    """
    x, d = inputs.double(), (inputs if dense is None else inputs + (dense - inputs) / 4).double()
    squares = x.square().sum(0)
    damping = (0.3 * squares + 0.01 * squares.mean()).sqrt().diag()
    matrix, wanted = torch.cat([x, damping]), torch.cat([d, damping]) @ weight.double().T
    kept = torch.as_tensor(kept)
    found = torch.zeros(C, R, dtype=torch.float64)
    found[kept] = torch.linalg.lstsq(matrix[:, kept], wanted).solution
    return found.T, (wanted - matrix @ found).square().sum().item()


@pytest.mark.parametrize("width", [1, 4])
def test_contributions_are_norms_of_what_is_added_to_the_outputs(
    weight: torch.Tensor, inputs: torch.Tensor, width: int
) -> None:
    found = contributions(weight, inputs.T @ inputs, C // width)
    parts = [
        torch.linalg.norm(inputs[:, i : i + width] @ weight[:, i : i + width].T)
        for i in range(0, C, width)
    ]
    torch.testing.assert_close(found, torch.stack(parts).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("paired", [False, True])
def test_refitted_weights_are_those_of_least_squares(
    weight: torch.Tensor, inputs: torch.Tensor, *, paired: bool
) -> None:
    dense = 1.1 * inputs + drawn(6, T, C) if paired else None
    kept = torch.arange(C) % 3 > 0

    found = refitted(least_squares(weight, inputs, dense), kept)

    best, _ = plain(weight, inputs, kept, dense)
    torch.testing.assert_close(found.double(), best, rtol=1e-4, atol=1e-5)
    assert not found[:, ~kept].any()


def test_all_columns_keep_their_weights(weight: torch.Tensor, inputs: torch.Tensor) -> None:
    kept = torch.ones(C, dtype=torch.bool)
    assert torch.equal(refitted(least_squares(weight, inputs), kept), weight)


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("paired", [False, True])
def test_structures_go_one_by_one_by_what_the_sum_of_squares_rises(
    weight: torch.Tensor, inputs: torch.Tensor, width: int, *, paired: bool
) -> None:
    dense = 1.1 * inputs + drawn(6, T, C) if paired else None
    structures = C // width
    keep = structures // 2

    kept, costs = least_error(least_squares(weight, inputs, dense), structures, keep)

    alive, expected = torch.ones(structures, dtype=torch.bool), torch.zeros(structures)
    while True:
        _, before = plain(weight, inputs, columns_of(alive, width), dense)
        for one in alive.nonzero()[:, 0].tolist():
            without = alive.clone()
            without[one] = False
            _, error = plain(weight, inputs, columns_of(without, width), dense)
            expected[one] = (error - before) ** 0.5
        if alive.sum() == keep:
            break
        alive[expected.masked_fill(~alive, torch.inf).argmin()] = False
    assert torch.equal(kept, alive)
    torch.testing.assert_close(costs.float(), expected, rtol=1e-2, atol=1e-3)


def test_the_choice_is_near_the_best_of_all(weight: torch.Tensor, inputs: torch.Tensor) -> None:
    keep = 3
    kept, _ = least_error(least_squares(weight, inputs), C // 4, keep)
    _, found = plain(weight, inputs, columns_of(kept, 4))
    errors = []
    for some in itertools.combinations(range(C // 4), keep):
        mask = np.isin(np.arange(C // 4), some)
        errors.append(plain(weight, inputs, columns_of(torch.from_numpy(mask), 4))[1])
    assert found < np.quantile(errors, 0.2)
