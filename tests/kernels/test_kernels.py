"""Every backend decides alike, writes the same bytes, and gives back every bit that it kept.

R rows of C weights, as bit patterns; `keep` is what the reference rule keeps of them.
"""

import math
from fractions import Fraction
from itertools import cycle

import numpy as np
import pytest
from emp_kernels import reference
from emp_kernels.counting import SLACK, trusted_count
from emp_kernels.dispatch import pack_rows, prune_rows, resolve, unpack_rows
from emp_kernels.errors import NonFiniteRowError
from emp_kernels.layout import RADICES, RowLayout
from emp_kernels.numbers import BF16, F16, F32
from emp_kernels.rows import PerRow, Threshold, Workspace
from support import format_reader
from support.rows import (
    KINDS,
    NUMBER_FORMATS,
    GuardedWorkspace,
    guarded,
    make_rows,
    to_bits,
    to_floats,
    zeros_elsewhere,
)

IMPLS = ("reference", "scalar", "simd")
BETAS = (0.01, 0.5, 1.0, 1.3, 1e308)
COLUMNS = (1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257)

formats = pytest.mark.parametrize("number_format", NUMBER_FORMATS, ids=lambda f: f.name)
impls = pytest.mark.parametrize("impl", IMPLS)


def rule_mask(weights, number_format, rule):
    """What the rule keeps, bool [R, C]."""
    if isinstance(rule, PerRow):
        scores = np.abs(to_floats(weights, number_format))
        return np.array([reference.keep_mask(row, rule.beta) for row in scores])
    keys = weights & number_format.key_mask
    tied = keys == rule.key
    first = np.cumsum(tied).reshape(tied.shape) <= rule.ties
    return (keys > rule.key) | (tied & first)


def assert_all_agree(weights, layout, rule):
    """All backends give the bytes of the reference, and the bits that the rule keeps."""
    expected = zeros_elsewhere(weights, rule_mask(weights, layout.number_format, rule))
    plain = pack_rows(weights, layout, rule, impl="reference")
    for impl in IMPLS:
        packed = pack_rows(weights, layout, rule, impl=impl, workspace=GuardedWorkspace(0xAA))
        np.testing.assert_array_equal(packed.table, plain.table)
        assert packed.payload.tobytes() == plain.payload.tobytes()
        payload = packed.payload.copy()
        out = np.full_like(weights, 0xFFFF)
        unpack_rows(
            payload, packed.table, layout, out=out, impl=impl, workspace=GuardedWorkspace(0xAA)
        )
        np.testing.assert_array_equal(out, expected)
        pruned = prune_rows(
            weights, layout.number_format, rule, impl=impl, workspace=GuardedWorkspace(0xAA)
        )
        np.testing.assert_array_equal(pruned.weights, expected)
    return plain


@formats
@pytest.mark.parametrize("columns", COLUMNS)
def test_rows_of_every_length_and_kind_pack_alike_everywhere(number_format, columns):
    radices, betas, rows, aligns = cycle(RADICES), cycle(BETAS), cycle((1, 3)), cycle((1, 16, 4))
    for kind in KINDS:
        weights = make_rows(kind, number_format, (next(rows), columns), seed=columns)
        layout = RowLayout(
            number_format=number_format, columns=columns, radix=next(radices), align=next(aligns)
        )
        assert_all_agree(weights, layout, PerRow(next(betas)))


@formats
@pytest.mark.parametrize("radix", RADICES)
@pytest.mark.parametrize("align", [1, 16])
def test_every_layout_packs_alike_everywhere_and_is_what_the_specification_says(
    number_format, radix, align
):
    for dropped_bits in {0, 1, 3, number_format.mantissa_bits - 1, number_format.mantissa_bits}:
        for kind in ("gaussian", "heavy tailed", "any finite bits"):
            weights = make_rows(kind, number_format, (2, 37), dropped_bits=dropped_bits)
            # some weights have bits that are not stored: they escape
            exceptions = make_rows(kind, number_format, (2, 37))
            weights[:, ::7] = exceptions[:, ::7]
            layout = RowLayout(
                number_format=number_format,
                columns=37,
                dropped_bits=dropped_bits,
                radix=radix,
                align=align,
            )
            packed = assert_all_agree(weights, layout, PerRow(1.0))
            parameters = format_reader.Parameters(
                number_format.code, dropped_bits, radix, align, columns=37
            )
            records = packed.payload.tobytes()
            dense, end = format_reader.read_rows(records, packed.table.tolist(), parameters)
            keep = rule_mask(weights, number_format, PerRow(1.0))
            np.testing.assert_array_equal(dense, zeros_elsewhere(weights, keep))
            assert end == len(records)


@formats
@pytest.mark.parametrize("columns", [16383, 16384, 16385])
def test_rows_past_a_chunk_of_counts_pack_alike_everywhere(number_format, columns):
    layout = RowLayout(number_format=number_format, columns=columns, radix=4, align=16)
    assert_all_agree(make_rows("gaussian", number_format, (1, columns)), layout, PerRow(1.0))


@pytest.mark.parametrize("impl", ["scalar", "simd"])
@formats
@pytest.mark.parametrize("kind", ["gaussian", "ties"])
def test_rows_of_more_weights_than_16_bits_count_are_decided_by_the_rule(number_format, kind, impl):
    weights = make_rows(kind, number_format, (1, 70_001))
    layout = RowLayout(number_format=number_format, columns=70_001)
    for beta in (0.5, 1.0, 1e308):
        mask = rule_mask(weights, number_format, PerRow(beta))
        expected = zeros_elsewhere(weights, mask)
        pruned = prune_rows(weights, number_format, PerRow(beta), impl=impl)
        np.testing.assert_array_equal(pruned.weights, expected)
        packed = pack_rows(weights, layout, PerRow(beta), impl=impl)
        assert packed.table[0, 0] == mask.sum()
        decoded = unpack_rows(packed.payload, packed.table, layout, impl=impl)
        np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize("impl", ["scalar", "simd"])
@formats
def test_nothing_past_the_weights_is_read_or_written(number_format, impl):
    for columns in COLUMNS:
        weights = make_rows("heavy tailed", number_format, (2, columns))
        copy = guarded(weights.nbytes).view(number_format.storage).reshape(weights.shape)
        copy[:] = weights
        layout = RowLayout(number_format=number_format, columns=columns, radix=2)
        packed = pack_rows(copy, layout, PerRow(1.0), impl=impl, workspace=GuardedWorkspace(0))
        expected = pack_rows(weights, layout, PerRow(1.0), impl=impl)
        assert packed.payload.tobytes() == expected.payload.tobytes()
        prune_rows(copy, number_format, PerRow(1.0), out=copy, impl=impl)
        decoded = unpack_rows(expected.payload, expected.table, layout, impl=impl)
        np.testing.assert_array_equal(copy, decoded)


@impls
@pytest.mark.parametrize(
    ("middle", "base", "escaped"),
    [
        (125, 0x3F00, 2),  # two of 128 escape: not more than one in 64
        (124, 0x3F80, 1),  # two of 127: the window moves up a binade and leaves out the smallest
    ],
)
def test_a_window_moves_only_if_more_than_one_weight_in_64_would_escape(
    middle, base, escaped, impl
):
    weights = np.array([[0x3F00, *[0x3F80] * middle, 0x4000, 0xC000]], np.uint16)
    layout = RowLayout(number_format=BF16, columns=weights.size, radix=2)
    packed = pack_rows(weights, layout, PerRow(1e308), impl=impl)
    assert packed.table.tolist() == [[weights.size, escaped, base]]


@pytest.mark.parametrize("impl", ["scalar", "simd"])
def test_more_weights_than_16_bits_count_may_be_equal_and_escape(impl):
    # radix 1 with no mantissa stored: every weight escapes, 70,000 of them
    layout = RowLayout(number_format=BF16, columns=70_000, dropped_bits=7, radix=1)
    weights = np.full((1, 70_000), 0x3F80, np.uint16)
    packed = pack_rows(weights, layout, PerRow(1.0), impl=impl)
    assert packed.table.tolist() == [[70_000, 70_000, 0x3F80 >> 7]]
    assert packed.payload.size == 70_000 // 8 + 140_000
    np.testing.assert_array_equal(
        unpack_rows(packed.payload, packed.table, layout, impl=impl), weights
    )


@formats
@pytest.mark.parametrize("ties", [0, 1, 5, 10**9])
def test_a_threshold_keeps_as_many_ties_as_it_says_in_row_major_order(number_format, ties):
    weights = make_rows("ties", number_format, (3, 45))
    key = int(to_bits(np.array([1.0]), number_format)[0])
    layout = RowLayout(number_format=number_format, columns=45)
    assert_all_agree(weights, layout, Threshold(key, ties))


@formats
def test_a_threshold_that_nothing_reaches_keeps_nothing(number_format):
    weights = make_rows("gaussian", number_format, (3, 45))
    layout = RowLayout(number_format=number_format, columns=45)
    packed = assert_all_agree(weights, layout, Threshold(number_format.infinity, 0))
    assert packed.table.tolist() == [[0, 0, 0]] * 3
    assert packed.payload.size == 0


@formats
def test_a_threshold_of_zero_with_its_ties_keeps_every_bit(number_format):
    weights = make_rows("any finite bits", number_format, (3, 45))
    weights[1, :5] = 1 << (number_format.bits - 1)  # −0.0
    layout = RowLayout(number_format=number_format, columns=45, radix=2)
    packed = assert_all_agree(weights, layout, Threshold(0, 10**9))
    assert packed.table[:, 0].tolist() == [45] * 3


@impls
@formats
def test_no_rows_give_no_bytes(number_format, impl):
    weights = np.empty((0, 5), number_format.storage)
    layout = RowLayout(number_format=number_format, columns=5)
    packed = pack_rows(weights, layout, PerRow(1.0), impl=impl)
    assert packed.table.shape == (0, 3)
    assert packed.stats.shape == (0, 3)
    assert packed.payload.size == 0
    assert unpack_rows(packed.payload.copy(), packed.table, layout, impl=impl).shape == (0, 5)
    assert prune_rows(weights, number_format, PerRow(1.0), impl=impl).weights.shape == (0, 5)


@impls
@formats
def test_the_stats_of_a_row_are_its_sums(number_format, impl):
    # 3, −1, 1, 0 has N_eff = 25 / 11 and keeps 3 and −1
    weights = to_bits(np.array([[3.0, -1.0, 1.0, 0.0], [0.0, -0.0, 0.0, 0.0]]), number_format)
    layout = RowLayout(number_format=number_format, columns=4)
    for emit in (True, False):
        packed = pack_rows(weights, layout, PerRow(1.0), emit=emit, impl=impl)
        assert packed.stats.tolist() == [[5.0, 11.0, 4.0], [0.0, 0.0, 0.0]]
        assert packed.table[:, 0].tolist() == [2, 0]
    assert prune_rows(weights, number_format, PerRow(1.0), impl=impl).stats.tolist() == [
        [5.0, 11.0, 4.0],
        [0.0, 0.0, 0.0],
    ]


@pytest.mark.parametrize("impl", ["scalar", "simd"])
@formats
def test_the_sums_of_any_row_are_right_to_float64(number_format, impl):
    for kind in KINDS:
        weights = make_rows(kind, number_format, (2, 83))
        layout = RowLayout(number_format=number_format, columns=83)
        stats = pack_rows(weights, layout, PerRow(1.0), emit=False, impl=impl).stats
        values = np.abs(to_floats(weights, number_format))
        kept = np.where(rule_mask(weights, number_format, PerRow(1.0)), values, 0)
        sums = [
            [math.fsum(row), math.fsum(row**2), math.fsum(left)]
            for row, left in zip(values, kept, strict=True)
        ]
        np.testing.assert_allclose(stats, sums, rtol=1e-14)


@impls
@formats
def test_measuring_returns_the_table_of_packing_without_a_payload(number_format, impl):
    weights = make_rows("heavy tailed", number_format, (3, 65))
    layout = RowLayout(number_format=number_format, columns=65, radix=2)
    packed = pack_rows(weights, layout, PerRow(1.0), impl=impl)
    measured = pack_rows(weights, layout, PerRow(1.0), emit=False, impl=impl)
    np.testing.assert_array_equal(measured.table, packed.table)
    assert measured.payload.size == 0
    sections = layout.sections(packed.table[:, 0], packed.table[:, 1])
    assert sections.sum() == packed.payload.size


@impls
@formats
def test_pruning_in_place_gives_what_pruning_to_the_side_gives(number_format, impl):
    for rule in (PerRow(0.7), Threshold(int(to_bits(np.array([1.0]), number_format)[0]), 4)):
        weights = make_rows("ties", number_format, (3, 67))
        expected = zeros_elsewhere(weights, rule_mask(weights, number_format, rule))
        pruned = prune_rows(weights, number_format, rule, out=weights, impl=impl)
        assert pruned.weights is weights
        np.testing.assert_array_equal(weights, expected)
        assert pruned.table.tolist() == [[kept, 0, 0] for kept in np.count_nonzero(expected, 1)]


def doubtful_betas(values, m):
    """Floats around m / (SLACK · N_eff), where float64 sums cannot distinguish m − 1 from m."""
    exact = [Fraction(v) for v in values.tolist()]
    n_eff = sum(exact) ** 2 / sum(v * v for v in exact)
    beta = float(m / (Fraction(SLACK) * n_eff))
    around = [math.nextafter(beta, 0), beta, math.nextafter(beta, math.inf)]
    return {b: math.floor(Fraction(b) * Fraction(SLACK) * n_eff) for b in around}


@impls
@formats
def test_counts_that_float64_cannot_decide_are_decided_exactly(number_format, impl):
    weights = make_rows("gaussian", number_format, (3, 99), seed=5)
    values = np.abs(to_floats(weights, number_format))
    layout = RowLayout(number_format=number_format, columns=99)
    expected = doubtful_betas(values[1], 40)
    assert set(expected.values()) == {39, 40}
    for beta, kept in expected.items():
        s1, s2 = math.fsum(values[1]), math.fsum(values[1] ** 2)
        assert trusted_count(s1, s2, 99, beta) is None
        packed = pack_rows(weights, layout, PerRow(beta), impl=impl)
        assert packed.table[1, 0] == kept
        assert_all_agree(weights, layout, PerRow(beta))
        in_place = weights.copy()
        prune_rows(in_place, number_format, PerRow(beta), out=in_place, impl=impl)
        assert np.count_nonzero(in_place[1]) == kept
        mask = rule_mask(weights, number_format, PerRow(beta))
        np.testing.assert_array_equal(in_place, zeros_elsewhere(weights, mask))


@impls
@formats
def test_all_rows_of_a_block_may_be_doubtful(number_format, impl):
    weights = np.tile(make_rows("gaussian", number_format, (1, 99), seed=5), (4, 1))
    values = np.abs(to_floats(weights[0], number_format))
    layout = RowLayout(number_format=number_format, columns=99)
    for beta, kept in doubtful_betas(values, 40).items():
        packed = pack_rows(weights, layout, PerRow(beta), impl=impl)
        assert packed.table[:, 0].tolist() == [kept] * 4
        quarter = packed.payload.size // 4
        assert packed.payload.tobytes() == packed.payload[:quarter].tobytes() * 4


NOT_FINITE = {
    "NaN": lambda f: f.infinity + 1,
    "the last NaN": lambda f: f.key_mask,
    "infinity": lambda f: f.infinity,
    "minus infinity": lambda f: f.infinity | 1 << (f.bits - 1),
}


@impls
@formats
@pytest.mark.parametrize("value", NOT_FINITE)
def test_nan_and_infinity_are_refused_with_their_row(number_format, value, impl):
    layout = RowLayout(number_format=number_format, columns=33)
    for column in (0, 31, 32):
        weights = make_rows("gaussian", number_format, (4, 33))
        weights[2, column] = NOT_FINITE[value](number_format)
        for rule in (PerRow(1.0), Threshold(5, 1)):
            with pytest.raises(NonFiniteRowError, match="row 2 holds NaN or infinity") as caught:
                pack_rows(weights, layout, rule, impl=impl)
            assert caught.value.row == 2
            with pytest.raises(NonFiniteRowError) as caught:
                prune_rows(weights, number_format, rule, impl=impl)
            assert caught.value.row == 2


@pytest.mark.parametrize("impl", ["scalar", "simd"])
def test_a_workspace_that_was_used_before_changes_nothing(impl):
    used = Workspace()
    for number_format, columns, rows in ((F32, 300, 2), (BF16, 10, 4), (F16, 130, 3), (F32, 9, 1)):
        layout = RowLayout(number_format=number_format, columns=columns, align=16)
        weights = make_rows("heavy tailed", number_format, (rows, columns))
        again = pack_rows(weights, layout, PerRow(1.0), impl=impl, workspace=used)
        fresh = pack_rows(weights, layout, PerRow(1.0), impl=impl)
        assert again.payload.tobytes() == fresh.payload.tobytes()
        np.testing.assert_array_equal(again.table, fresh.table)


def test_auto_is_one_of_the_compiled_backends():
    assert resolve("auto") in ("scalar", "simd")
