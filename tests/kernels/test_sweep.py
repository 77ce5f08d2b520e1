"""What rows come to at many β at once is what packing them at each β comes to."""

from itertools import cycle, product

import numpy as np
import pytest
from emp_kernels.dispatch import count_rows, pack_rows, sweep_rows, trailing_zeros
from emp_kernels.errors import NonFiniteRowError
from emp_kernels.layout import RADICES, RowLayout
from emp_kernels.numbers import BF16, F16, F32
from emp_kernels.rows import PerRow
from support.rows import KINDS, NUMBER_FORMATS, make_rows

BETAS = (0.01, 0.5, 0.75, 1.0, 1.3, 1.55, 3.0, float("inf"))

formats = pytest.mark.parametrize("number_format", NUMBER_FORMATS, ids=lambda f: f.name)
kinds = pytest.mark.parametrize("kind", KINDS)


def layouts_of(number_format, columns):
    dropped = (0, 3, number_format.mantissa_bits)
    return [
        RowLayout(
            number_format=number_format, columns=columns, dropped_bits=d, radix=radix, align=align
        )
        for (d, radix), align in zip(product(dropped, RADICES), cycle((1, 16)), strict=False)
    ]


@formats
@kinds
@pytest.mark.parametrize("columns", [1, 33, 300])
def test_a_sweep_gives_what_packing_at_each_beta_gives(number_format, kind, columns):
    weights = make_rows(kind, number_format, (3, columns), seed=columns)
    layouts = layouts_of(number_format, columns)
    counts = count_rows(weights, number_format, BETAS)
    kept = np.repeat(counts.kept, len(layouts), axis=1)
    swept = sweep_rows(weights, kept, layouts * len(BETAS))
    point = 0
    for beta in BETAS:
        for layout in layouts:
            packed = pack_rows(weights, layout, PerRow(min(beta, 1e308)))
            np.testing.assert_array_equal(packed.table[:, 0], kept[:, point])
            np.testing.assert_array_equal(packed.table[:, 1], swept.escaped[:, point])
            np.testing.assert_allclose(packed.stats[:, 2], swept.kept_mass[:, point], rtol=1e-12)
            np.testing.assert_allclose(packed.stats[:, :2], counts.stats, rtol=1e-12)
            assert packed.payload.size == swept.record_bytes[point]
            point += 1


@formats
@kinds
def test_the_compiled_sweep_gives_what_the_reference_gives(number_format, kind):
    weights = make_rows(kind, number_format, (2, 40), seed=1)
    layouts = layouts_of(number_format, 40)
    counts = {
        impl: count_rows(weights, number_format, BETAS, impl=impl) for impl in ("auto", "reference")
    }
    np.testing.assert_array_equal(counts["auto"].kept, counts["reference"].kept)
    kept = np.repeat(counts["reference"].kept, len(layouts), axis=1)
    ours, plain = (sweep_rows(weights, kept, layouts * len(BETAS), impl=impl) for impl in counts)
    np.testing.assert_array_equal(ours.escaped, plain.escaped)
    np.testing.assert_array_equal(ours.record_bytes, plain.record_bytes)
    np.testing.assert_allclose(ours.kept_mass, plain.kept_mass, rtol=1e-12)
    zeros = [
        trailing_zeros(weights, number_format, counts["auto"].kept, impl=impl) for impl in counts
    ]
    np.testing.assert_array_equal(*zeros)


def test_points_in_any_order_give_the_same():
    weights = make_rows("heavy tailed", BF16, (4, 500))
    layouts = layouts_of(BF16, 500)[::5]
    rng = np.random.default_rng(0)
    order = rng.permutation(len(layouts) * 7)
    kept = np.repeat(count_rows(weights, BF16, BETAS[1:]).kept, len(layouts), axis=1)
    points = layouts * 7
    swept = sweep_rows(weights, kept, points)
    mixed = sweep_rows(weights, kept[:, order], [points[p] for p in order])
    np.testing.assert_array_equal(mixed.escaped, swept.escaped[:, order])
    np.testing.assert_array_equal(mixed.record_bytes, swept.record_bytes[order])
    np.testing.assert_allclose(mixed.kept_mass, swept.kept_mass[:, order], rtol=1e-12)


def test_trailing_zeros_are_those_of_the_weights_that_stay_and_of_no_zero():
    # keys 0, 1, 2, 4 and 8, twice 4
    weights = np.array([[4, 0, 0x8001, 2, 8, 0x8004]], np.uint16)
    kept = np.array([[0, 1, 2, 4, 6, 3]], np.int64)
    found = trailing_zeros(weights, BF16, kept)[:, :4].tolist()
    assert found == [
        [0, 0, 0, 0],
        [0, 0, 0, 1],
        [0, 0, 1, 1],
        [0, 1, 2, 1],
        [1, 1, 2, 1],
        [0, 0, 2, 1],
    ]


@pytest.mark.parametrize("number_format", [BF16, F16, F32], ids=lambda f: f.name)
def test_the_row_that_is_not_finite_is_named(number_format):
    weights = make_rows("gaussian", number_format, (5, 70))
    weights[3, 69] = number_format.infinity
    for impl in ("auto", "reference"):
        with pytest.raises(NonFiniteRowError) as caught:
            count_rows(weights, number_format, BETAS, impl=impl)
        assert caught.value.row == 3


def test_a_count_that_rounding_could_decide_is_exact():
    # N_eff is 3 exactly: at β = 1/3, rounded down to a double, the slack alone makes it 1;
    # rows of equal weights have β · N_eff on an integer for many β
    weights = np.full((1, 999), 0x3F80, np.uint16)
    betas = [i / 999 for i in range(1, 1000, 37)]
    assert count_rows(weights, BF16, betas).kept.tolist() == [list(range(1, 1000, 37))]
