"""Sampling keeps as many weights as it is told, and every weight on average."""

import numpy as np
import pytest

from emp_llm.selection.sampled_selection import sample_row_block

ROWS, COLUMNS, DRAWS = 4, 40, 4000
KEPT = np.array([0, 1, 15, COLUMNS])


@pytest.fixture
def weights() -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    values[0] = 0
    return values


def test_weights_are_kept_on_average_by_exactly_so_many(weights: np.ndarray) -> None:
    total = np.zeros_like(weights, dtype=np.float64)
    for draw in range(DRAWS):
        sample = weights.copy()
        sums = sample_row_block(sample, KEPT, f"tensor {draw}", 0)
        assert np.array_equal(np.count_nonzero(sample, axis=1), KEPT)
        kept_mass = (np.abs(weights) * (sample != 0)).sum(1)
        assert np.allclose(sums.T, [np.abs(weights).sum(1), (weights**2).sum(1), kept_mass])
        total += sample
    mean = total / DRAWS
    assert np.array_equal(sample[3], weights[3])
    # a sum over a row, and each of its weights; one in a row of 40 has a wide spread
    assert np.allclose(mean[2], weights[2], atol=0.06)
    assert mean[2].sum() == pytest.approx(weights[2].sum(), abs=0.3)
    assert np.abs(mean[1]).sum() == pytest.approx(np.abs(weights[1]).sum(), rel=0.1)


def test_a_weight_is_sampled_the_same_in_any_block(weights: np.ndarray) -> None:
    whole, parts = weights.copy(), weights.copy()
    sample_row_block(whole, KEPT, "a", 7)
    for row in range(ROWS):
        sample_row_block(parts[row : row + 1], KEPT[row : row + 1], "a", 7 + row)
    assert np.array_equal(whole, parts)
    other = weights.copy()
    sample_row_block(other, KEPT, "b", 7)
    assert not np.array_equal(whole, other)
