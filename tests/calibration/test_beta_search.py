"""The bisection for β."""

import pytest

from emp_llm.calibration.beta_search import bisect_beta


@pytest.mark.parametrize("least", [0.0, 0.009, 0.0181, 0.0305, 0.05, 0.3, 0.9, 1.7, 40.0])
def test_the_least_beta_is_found_within_two_per_cent_in_few_evaluations(least: float) -> None:
    tried: list[float] = []

    def measure(beta: float) -> float:
        tried.append(beta)
        assert len(tried) <= 14, tried
        return 1.0 if beta >= least else 2.0

    found = bisect_beta(measure, 1.5)
    assert found in tried
    assert found >= least
    refused = [beta for beta in tried if beta < least]
    assert found - max(refused, default=1 / 128) <= 0.02 * found
    assert len(set(tried)) == len(tried)
