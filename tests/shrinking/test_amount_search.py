"""The bisection for the fewest structures."""

import pytest

from emp_llm.shrinking.amount_search import fewest


@pytest.mark.parametrize("least", range(1, 13))
def test_the_fewest_structures_are_found_in_few_evaluations(least: int) -> None:
    tried: list[int] = []

    def measure(number: int) -> float:
        tried.append(number)
        return 1.0 if number >= least else 2.0

    assert fewest(range(1, 13), measure, 1.5) == least
    assert len(tried) == len(set(tried)) <= 4
    assert 12 not in tried  # with all of them nothing goes


def test_losses_at_the_bound_are_low_enough() -> None:
    assert fewest([2, 4, 6, 8], {2: 3.0, 4: 2.0, 6: 1.0}.__getitem__, 2.0) == 4
