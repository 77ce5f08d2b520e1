"""Masks apart from weights: scores to masks by the rule, and rows packed by masks that are given.

R rows of C weights or scores, as bit patterns; `keep` is bool [R, C], what stays.
"""

import math

import numpy as np
import pytest
from emp_kernels import reference
from emp_kernels.dispatch import pack_rows, prune_rows, select_rows, unpack_rows
from emp_kernels.errors import NonFiniteRowError
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import BF16, F32
from emp_kernels.rows import Given, PerRow, Threshold
from support.rows import (
    KINDS,
    NUMBER_FORMATS,
    GuardedWorkspace,
    make_rows,
    to_floats,
    zeros_elsewhere,
)
from test_kernels import doubtful_betas

IMPLS = ("reference", "scalar", "simd")
COLUMNS = (1, 8, 9, 16, 31, 32, 33, 129)

formats = pytest.mark.parametrize("number_format", NUMBER_FORMATS, ids=lambda f: f.name)
impls = pytest.mark.parametrize("impl", IMPLS)


def as_mask(keep: np.ndarray) -> np.ndarray:
    return np.packbits(keep, axis=1, bitorder="little")


def some_masks(shape, seed=0):
    """Nothing, everything, the first, the last and any columns, bool [R, C]."""
    rng = np.random.default_rng([seed, *shape])
    keep = rng.random(shape) < rng.random((shape[0], 1))
    ends = np.zeros((2, *shape), bool)
    ends[0, :, 0] = ends[1, :, -1] = True
    return [keep, np.zeros(shape, bool), np.ones(shape, bool), *ends]


@formats
@pytest.mark.parametrize("columns", COLUMNS)
def test_any_mask_packs_alike_everywhere_and_keeps_every_bit_that_it_names(number_format, columns):
    for rows, kind in zip((0, 1, 3) * 3, KINDS, strict=True):
        weights = make_rows(kind, number_format, (rows, columns), seed=columns)
        layout = RowLayout(number_format=number_format, columns=columns, radix=4, align=16)
        for keep in some_masks((rows, columns)):
            rule, expected = Given(as_mask(keep)), zeros_elsewhere(weights, keep)
            plain = pack_rows(weights, layout, rule, impl="reference")
            assert plain.table[:, 0].tolist() == keep.sum(axis=1).tolist()
            for impl in IMPLS:
                packed = pack_rows(
                    weights, layout, rule, impl=impl, workspace=GuardedWorkspace(0xAA)
                )
                np.testing.assert_array_equal(packed.table, plain.table)
                assert packed.payload.tobytes() == plain.payload.tobytes()
                measured = pack_rows(weights, layout, rule, impl=impl, emit=False)
                np.testing.assert_array_equal(measured.table, plain.table)
                copy = weights.copy()
                pruned = prune_rows(copy, number_format, rule, out=copy, impl=impl)
                assert pruned.weights is copy
                np.testing.assert_array_equal(copy, expected)
                assert pruned.table.tolist() == [[k, 0, 0] for k in keep.sum(axis=1)]
            decoded = unpack_rows(plain.payload, plain.table, layout)
            np.testing.assert_array_equal(decoded, expected)


@impls
@formats
def test_a_mask_that_the_rule_gives_packs_to_the_bytes_of_the_rule(number_format, impl):
    weights = make_rows("gaussian", number_format, (3, 129))
    keep = np.array([reference.keep_mask(r, 1.0) for r in abs(to_floats(weights, number_format))])
    layout = RowLayout(number_format=number_format, columns=129)
    given = pack_rows(weights, layout, Given(as_mask(keep)), impl=impl)
    ruled = pack_rows(weights, layout, PerRow(1.0), impl="reference")
    assert given.payload.tobytes() == ruled.payload.tobytes()
    np.testing.assert_array_equal(given.table, ruled.table)
    np.testing.assert_allclose(given.stats, ruled.stats, rtol=1e-14)


@impls
def test_a_mask_may_keep_the_smaller_weights_and_zeros_of_either_sign(impl):
    # 3, −0.0, 0.5, −1, 0.0 without its first
    weights = np.array([[0x4040, 0x8000, 0x3F00, 0xBF80, 0x0000]], np.uint16)
    layout = RowLayout(number_format=BF16, columns=5)
    rule = Given(np.array([[0b11110]], np.uint8))
    packed = pack_rows(weights, layout, rule, impl=impl)
    assert packed.table[0, 0] == 4
    assert packed.stats.tolist() == [[4.5, 10.25, 1.5]]
    decoded = unpack_rows(packed.payload.copy(), packed.table, layout, impl=impl)
    assert decoded.tolist() == [[0, 0x8000, 0x3F00, 0xBF80, 0]]
    assert prune_rows(weights, BF16, rule, impl=impl).weights.tolist() == decoded.tolist()


@impls
def test_not_finite_weights_are_refused_under_a_mask_that_drops_them_too(impl):
    weights = make_rows("gaussian", BF16, (3, 40))
    weights[1, 5] = 0x7F80
    layout = RowLayout(number_format=BF16, columns=40)
    with pytest.raises(NonFiniteRowError) as caught:
        pack_rows(weights, layout, Given(np.zeros((3, 5), np.uint8)), impl=impl)
    assert caught.value.row == 1


@pytest.mark.parametrize(
    "mask",
    [
        np.zeros((2, 2), np.uint8),
        np.zeros((3, 1), np.uint8),
        np.zeros((3, 2), np.int8),
        np.zeros((3, 4), np.uint8)[:, ::2],
        np.full((3, 2), 0b1100, np.uint8),  # column 11 of 10
    ],
)
def test_a_mask_of_another_shape_or_kind_is_refused(mask):
    weights = make_rows("gaussian", BF16, (3, 10))
    with pytest.raises(ValueError, match="the mask"):
        prune_rows(weights, BF16, Given(mask))


def keep_of(scores, rule, kept=None):
    """What stays of scores, float32 [R, C], by plain numpy."""
    if isinstance(rule, Threshold):
        keys = scores.view(np.uint32)
        tied = keys == rule.key
        return (keys > rule.key) | (tied & (np.cumsum(tied).reshape(tied.shape) <= rule.ties))
    keep = np.zeros(scores.shape, bool)
    for r, row in enumerate(scores):
        count = reference.keep_count(row, rule.beta) if kept is None else kept[r]
        keep[r, np.argsort(-row.astype(np.float64), kind="stable")[:count]] = True
    return keep


@pytest.mark.parametrize("columns", COLUMNS)
def test_scores_of_every_kind_are_selected_alike_everywhere(columns):
    rng = np.random.default_rng(columns)
    for rows, kind in zip((0, 1, 3) * 3, KINDS, strict=True):
        bits = make_rows(kind, F32, (rows, columns), seed=columns) & 0x7FFFFFFF
        scores = bits.view(np.float32)
        threshold = Threshold(int(bits[0, 0]) if rows else 7, 2)
        counts = rng.integers(0, columns + 1, rows)
        for rule, kept in ((PerRow(0.7), None), (threshold, None), (PerRow(1.0), counts)):
            keep = keep_of(scores, rule, kept)
            values = scores.astype(np.float64)
            sums = [
                [math.fsum(row), math.fsum(row**2), math.fsum(row[left])]
                for row, left in zip(values, keep, strict=True)
            ]
            for impl in IMPLS:
                selected = select_rows(
                    bits, rule, kept=kept, impl=impl, workspace=GuardedWorkspace(0xAA)
                )
                np.testing.assert_array_equal(selected.mask, as_mask(keep))
                assert selected.table.tolist() == [[k, 0, 0] for k in keep.sum(axis=1)]
                expected = np.reshape(sums, (rows, 3))
                np.testing.assert_allclose(selected.stats, expected, rtol=1e-14)


@impls
def test_counts_of_scores_that_float64_cannot_decide_are_decided_exactly(impl):
    bits = np.tile(make_rows("gaussian", F32, (1, 99), seed=5) & 0x7FFFFFFF, (3, 1))
    for beta, count in doubtful_betas(bits.view(np.float32)[0].astype(np.float64), 40).items():
        selected = select_rows(bits, PerRow(beta), impl=impl)
        assert selected.table[:, 0].tolist() == [count] * 3
        keep = keep_of(bits.view(np.float32), PerRow(1.0), [count] * 3)
        np.testing.assert_array_equal(selected.mask, as_mask(keep))


@impls
def test_not_finite_scores_are_refused_with_their_row(impl):
    bits = np.zeros((4, 9), np.uint32)
    bits[2, 8] = F32.infinity
    for kept in (None, np.zeros(4, np.int64)):
        with pytest.raises(NonFiniteRowError) as caught:
            select_rows(bits, PerRow(1.0), kept=kept, impl=impl)
        assert caught.value.row == 2


@pytest.mark.parametrize("kept", [[1, 2], [1, -1, 2], [1, 2, 10]])
def test_counts_that_cannot_be_are_refused(kept):
    with pytest.raises(ValueError, match=r"int64 \[3\] from 0 to 9"):
        select_rows(np.zeros((3, 9), np.uint32), PerRow(1.0), kept=np.array(kept))
