"""The count is an integer on which every order of summation has to agree."""

import math
from fractions import Fraction

import numpy as np
import pytest
from emp_kernels.counting import SLACK, exact_count, exact_sums, trusted_count
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("scores", "beta", "count"),
    [
        ([3, 1, 0, 0], 1.0, 1),  # N_eff = 16 / 10
        ([3, 1, 0, 0], 1.3, 2),  # 2.08
        ([3, 1, 1, 0], 1.0, 2),  # 25 / 11 = 2.27
        ([3, 1, 1, 0], 1.4, 3),  # 3.18
        ([3, 1, 1, 0], 100.0, 4),  # no more than there are
        ([3, 1, 1, 0], 0.001, 1),  # no fewer than one
        ([0, 0, 0, 0], 1.0, 0),
        ([7, 0, 0, 0], 1.0, 1),
        ([5], 1.0, 1),
    ],
)
def test_counts_worked_out_by_hand(scores, beta, count):
    s1, s2 = sum(scores), sum(s * s for s in scores)
    assert trusted_count(float(s1), float(s2), len(scores), beta) == count
    assert exact_count(s1, s2, len(scores), beta) == count


@pytest.mark.parametrize("n", [1, 2, 3, 7, 100, 4096, 11008, 1_000_003])
@pytest.mark.parametrize("score", [0.1, 1.0, 3e-5])
def test_equal_scores_all_stay_though_their_sums_are_rounded(n, score):
    s1, s2 = math.fsum([score] * n), math.fsum([score * score] * n)
    assert trusted_count(s1, s2, n, 1.0) == n
    assert exact_count(n * Fraction(score), n * Fraction(score) ** 2, n, 1.0) == n


@pytest.mark.parametrize("beta", [1e15, 1e308, 1.7976931348623157e308])
def test_a_huge_beta_keeps_everything(beta):
    # the last one times the slack is infinite
    assert trusted_count(4.0, 10.0, 4, beta) == 4
    assert exact_count(4, 10, 4, beta) == 4


@pytest.mark.parametrize("beta", [5e-324, 1e-300])
def test_a_tiny_beta_keeps_one(beta):
    assert trusted_count(4.0, 10.0, 4, beta) == 1
    assert exact_count(4, 10, 4, beta) == 1


def just_below(integer, n_eff):
    """The largest beta whose exact count is still short of an integer."""
    beta = float(integer / (Fraction(SLACK) * n_eff))
    while Fraction(beta) * Fraction(SLACK) * n_eff >= integer:
        beta = math.nextafter(beta, 0)
    return beta


def test_a_count_next_to_an_integer_is_doubtful_and_decided_exactly():
    scores = [3, 1, 1, 2, 5, 1]  # S1 = 13, S2 = 41
    below = just_below(3, Fraction(169, 41))
    above = math.nextafter(below, math.inf)
    for beta, count in ((below, 2), (above, 3)):
        assert trusted_count(13.0, 41.0, len(scores), beta) is None
        assert exact_count(13, 41, len(scores), beta) == count


def test_a_count_far_from_an_integer_is_not_doubtful():
    # 2.5 and a little: a doubt of (3 · 10**6 + 16) · 2**-53 does not reach an integer
    assert trusted_count(5.0, 10.0, 10**6, 1.0) == 2


def test_doubt_grows_with_the_number_of_scores():
    beta = 3.0 * (1 - 1e-12) / SLACK  # N_eff = 1: short of 3 by 3e-12
    assert trusted_count(1.0, 1.0, 100, beta) == 2
    assert trusted_count(1.0, 1.0, 100_000, beta) is None


def test_doubt_past_the_number_of_scores_does_not_matter():
    # exactly n: rounding decides between n and more than n, which is n
    assert trusted_count(4.0, 4.0, 4, 1.0) == 4
    assert trusted_count(4.0, 4.0, 4, 2.0 / SLACK) == 4


def test_exact_sums_by_hand():
    # 3 · 2**0 and 1 · 2**0; 5 · 2**-2, whose square is 25 / 16
    assert exact_sums([(0, 4, 10), (-2, 5, 25)]) == (Fraction(21, 4), Fraction(185, 16))


def test_exact_sums_of_nothing_are_zero():
    assert exact_sums([]) == (0, 0)


def test_exact_sums_lose_nothing_over_the_whole_range_of_exponents():
    s1, s2 = exact_sums([(-149, 1, 1), (104, 1, 1)])
    assert s1 == Fraction(2) ** 104 + Fraction(1, 2**149)
    assert s2 == Fraction(2) ** 208 + Fraction(1, 2**298)


def test_a_common_unit_of_the_sums_changes_no_exact_count():
    for unit in (Fraction(1, 2**149), Fraction(7, 3), 2**100):
        assert exact_count(13 * unit, 41 * unit**2, 6, 1.0) == 4  # 169 / 41 = 4.12


def sums_in_order(values, order):
    s1 = s2 = 0.0
    for value in values[order].tolist():
        s1 += value
        s2 += value * value
    return s1, s2


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 1e10, width=32), min_size=1, max_size=60),
    st.floats(0.01, 10),
    st.integers(0, 2**32),
)
def test_a_trusted_count_is_the_exact_one_in_any_order_of_summation(scores, beta, seed):
    values, n = np.array(scores), len(scores)
    exact = [Fraction(score) for score in scores]
    expected = exact_count(sum(exact), sum(score**2 for score in exact), n, beta)
    rng = np.random.default_rng(seed)
    for order in (np.argsort(values), np.argsort(-values), rng.permutation(n), rng.permutation(n)):
        assert trusted_count(*sums_in_order(values, order), n, beta) in (expected, None)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 50))
def test_near_an_integer_too_no_order_of_summation_trusts_another_count(seed, integer):
    rng = np.random.default_rng(seed)
    values = np.abs(rng.standard_normal(99).astype(np.float32)).astype(np.float64)
    exact = [Fraction(value) for value in values.tolist()]
    s1, s2 = sum(exact), sum(value**2 for value in exact)
    beta = just_below(integer, s1**2 / s2)
    for steps in (0, 1, 4, 16, 64, 256):
        near = beta * (1 + steps * 2.0**-51)
        expected = max(1, integer - 1 if steps == 0 else integer)
        assert exact_count(s1, s2, 99, near) == expected
        for order in (np.argsort(values), rng.permutation(99)):
            assert trusted_count(*sums_in_order(values, order), 99, near) in (expected, None)
