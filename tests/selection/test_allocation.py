"""Counts for each target: the same share of all, or those with the least sum of losses."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from emp_llm.selection.allocation import Allocation, Curve, least, spread


@pytest.mark.parametrize(("total", "groups"), [(0, 3), (7, 7), (1000, 7), (5, 9), (3 << 40, 1000)])
def test_a_number_is_spread_evenly(total: int, groups: int) -> None:
    counts = spread(total, groups)
    assert counts.sum() == total
    assert counts.max() - counts.min() <= 1


def test_each_target_keeps_the_same_share_and_all_together_the_total() -> None:
    sizes = {"b": 100, "a": 33, "c": 7, "d": 10**12 + 1}
    for total in (1, 70, 5 * 10**11 + 3, sum(sizes.values())):
        kept = Allocation.uniform(sizes, total).kept
        share = Fraction(total, sum(sizes.values()))
        assert sum(kept.values()) == total
        assert all(abs(kept[name] - share * sizes[name]) < 1 for name in sizes)


def curve(seed: int, points: int) -> Curve:
    """A convex curve with uneven steps."""
    rng = np.random.default_rng(seed)
    kept = np.cumsum(rng.integers(1, 9, points))
    slopes = np.sort(rng.random(points - 1))[::-1]
    loss = 3 - np.concatenate([[0], np.cumsum(slopes * np.diff(kept))])
    return Curve(kept, loss - loss.min())


@pytest.mark.parametrize("seed", range(5))
def test_no_other_counts_on_the_curves_lose_less(seed: int) -> None:
    curves = [curve(10 * seed + number, 6) for number in range(4)]
    for points in product(range(6), repeat=4):
        total = sum(int(c.kept[p]) for c, p in zip(curves, points, strict=True))
        found = least(curves, total)
        assert sum(found) == total
        between = [kept for c, kept in zip(curves, found, strict=True) if kept not in c.kept]
        assert len(between) <= 1
        lost = sum(np.interp(kept, c.kept, c.loss) for c, kept in zip(curves, found, strict=True))
        other = sum(c.loss[p] for c, p in zip(curves, points, strict=True))
        assert lost <= other + 1e-12


def test_a_point_above_the_line_between_its_neighbours_is_passed_over() -> None:
    # the first two weights of `a` bring nothing, but all four bring more than those of `b`
    a = Curve(np.array([0, 2, 4]), np.array([8.0, 8.0, 0.0]))
    b = Curve(np.array([0, 2, 4]), np.array([3.0, 1.0, 0.0]))
    assert least([a, b], 4) == [4, 0]


def test_what_has_one_point_keeps_it() -> None:
    fixed = Curve(np.array([5]), np.array([0.0]))
    assert least([fixed, curve(1, 4), fixed], 10 + int(curve(1, 4).kept[2]))[::2] == [5, 5]


def test_points_with_equal_counts_are_one() -> None:
    full = Curve(np.array([1, 4, 4, 4]), np.array([2.0, 1.0, 0.0, 0.0]))
    assert least([full, full], 8) == [4, 4]
