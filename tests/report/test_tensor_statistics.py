"""The report's figures, worked out by hand; the bound of retained mass, by trying every integer."""

import math

import numpy as np
import pytest
from emp_kernels import reference
from emp_kernels.dispatch import pack_rows
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import BF16
from emp_kernels.rows import PackedRows, PerRow
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rows import KINDS, make_rows

from emp_llm.report.tensor_statistics import Group, GroupTally, effective_numbers, mass_bound


def bound_by_brute_force(n, size):
    """The least over all integers j in (k, N], as the paper has it."""
    k = min(math.floor(n * (1 + 1e-9)), size)
    shares = [
        k / j + (1 - k / j) * math.sqrt((1 / n - 1 / j) / (1 - 1 / j))
        for j in range(k + 1, size + 1)
    ]
    return min(shares, default=1.0)


def bounds(n, size):
    return mass_bound(np.array(n, np.float64), np.array(size, np.int64)).tolist()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 13, 40, 100, 1000])
def test_the_bound_is_the_least_over_all_integers(size):
    rng = np.random.default_rng(size)
    n = [1.0, float(size), *rng.uniform(1, size, 60).tolist()]
    n += [float(k) for k in range(1, size + 1, max(1, size // 20))]
    n += [min(size, x + 1e-6) for x in n] + [max(1.0, x - 1e-6) for x in n]
    assert bounds(n, [size] * len(n)) == pytest.approx(
        [bound_by_brute_force(x, size) for x in n], rel=1e-12
    )


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 3000), st.floats(0, 1))
def test_the_bound_of_any_effective_number_is_the_least_over_all_integers(size, share):
    n = 1 + share * (size - 1)
    assert bounds([n], [size])[0] == pytest.approx(bound_by_brute_force(n, size), rel=1e-12)


def test_bounds_worked_out_by_hand():
    # n = 25/11, k = 2: j = 3 gives 2/3 + 1/3 · √((11/25 − 1/3) / (2/3)) = 0.8,
    # j = 4 gives 1/2 + 1/2 · √((11/25 − 1/4) / (3/4)) = 0.75166
    assert bounds([25 / 11, 1.0, 4.0, 0.0], [4, 4, 4, 4]) == pytest.approx(
        [0.5 + 0.5 * math.sqrt(0.19 / 0.75), 1.0, 1.0, 1.0]
    )


def test_a_group_of_equal_scores_is_kept_whole_though_its_effective_number_is_rounded_down():
    assert bounds([math.nextafter(77.0, 0)], [77]) == [1.0]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=60))
def test_the_kept_weights_hold_at_least_their_bound(scores):
    values = np.array(scores)
    kept = values[reference.keep_mask(values, 1.0)]
    n = reference.effective_number(values)
    (least,) = bounds([n], [values.size])
    assert kept.sum() >= least * values.sum() * (1 - 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_tally_of_real_rows_retains_at_least_its_bound(kind):
    layout = RowLayout(number_format=BF16, columns=200)
    tally = GroupTally(200, True, None)
    for seed in range(3):
        weights = make_rows(kind, BF16, (4, 200), seed=seed)
        tally.add(pack_rows(weights, layout, PerRow(1.0), emit=False))
    figures = tally.statistics((12, 200), 4800, 2400)
    assert figures.kept_mass >= figures.bound_mass * (1 - 1e-12)


def test_effective_numbers_of_groups_without_mass_are_zero():
    n = effective_numbers(np.array([5.0, 0.0, 4.0]), np.array([11.0, 0.0, 4.0]))
    assert n.tolist() == [25 / 11, 0.0, 4.0]


def block(*rows):
    """A block as the kernels give it, from each row's (kept, Σs, Σs², Σ_kept s)."""
    table = np.array([[kept, 0, 0] for kept, *_ in rows], np.int64)
    stats = np.array([[s1, s2, kept_mass] for _, s1, s2, kept_mass in rows], np.float64)
    return PackedRows(table, stats, np.empty(0, np.uint8))


# 3 1 1 0; 1 1 1 1; nothing but zeros
FIRST = block((2, 5, 11, 4), (4, 4, 4, 4))
SECOND = block((0, 0, 0, 0))


def tallied(beta, shared=None):
    tally = GroupTally(4, beta == 1.0, shared)
    tally.add(FIRST)
    tally.add(SECOND)
    return tally.statistics((3, 4), 24, 15)


def test_the_figures_of_rows_worked_out_by_hand():
    figures = tallied(1.0)
    assert (figures.rows, figures.weights, figures.kept) == (3, 12, 6)
    assert (figures.mass, figures.kept_mass) == (9.0, 8.0)
    assert (figures.n_eff_min, figures.n_eff_max) == (0.0, 4.0)
    assert figures.n_eff_mean == pytest.approx(69 / 33)
    assert figures.fraction_mean == pytest.approx(69 / 132)
    assert figures.bound_mass == pytest.approx(5 * (0.5 + 0.5 * math.sqrt(0.19 / 0.75)) + 4)


def test_no_bound_is_told_for_another_beta_than_one():
    assert tallied(0.9).bound_mass is None
    assert tallied(0.9).to_dict()["retained_mass_bound"] is None


def test_the_figures_as_json_have_six_digits():
    assert tallied(1.0).to_dict() == {
        "shape": [3, 4],
        "rows": 3,
        "weights": 12,
        "kept": 6,
        "sparsity": 0.5,
        "n_eff_min": 0.0,
        "n_eff_mean": 2.09091,
        "n_eff_max": 4.0,
        "n_eff_fraction_min": 0.0,
        "n_eff_fraction_mean": 0.522727,
        "n_eff_fraction_max": 1.0,
        # 0, 25/11/4 = 0.568 and 1
        "n_eff_fraction_histogram_start": 0,
        "n_eff_fraction_histogram": [1, *[0] * 27, 1, *[0] * 20, 1],
        "mass": 9.0,
        "retained_mass": 0.888889,
        "retained_mass_bound": 0.862034,  # (5 · 0.7516611 + 4) / 9
        "bytes_before": 24,
        "bytes_after": 15,
    }


def test_the_figures_of_larger_groups_come_from_the_groups():
    groups = [Group(n_eff=3.0, size=8, mass=6.0), Group(n_eff=1.0, size=4, mass=3.0)]
    figures = tallied(1.0, groups)
    assert (figures.n_eff_min, figures.n_eff_mean, figures.n_eff_max) == (1.0, 2.0, 3.0)
    assert figures.fraction_mean == pytest.approx((3 / 8 + 1 / 4) / 2)
    assert figures.kept == 6
    # j = 4: 3/4 + 1/4 · √((1/3 − 1/4) / (3/4)) = 0.833
    # j = 8: 3/8 + 5/8 · √((1/3 − 1/8) / (7/8)) = 0.680
    first = 3 / 8 + 5 / 8 * math.sqrt(5 / 21)
    assert figures.bound_mass == pytest.approx(6 * first + 3)


def test_a_group_that_reaches_past_the_tensor_gives_it_no_bound():
    assert tallied(1.0, [Group(n_eff=3.0, size=100, mass=6.0)]).bound_mass is None


def test_a_tensor_of_zeros_retains_all_of_its_nothing():
    tally = GroupTally(4, True, None)
    tally.add(SECOND)
    figures = tally.statistics((1, 4), 8, 4).to_dict()
    assert (figures["retained_mass"], figures["retained_mass_bound"]) == (1.0, 1.0)
    assert figures["sparsity"] == 1.0
