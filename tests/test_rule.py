"""The rule by hand, and the same from numpy's reference and from PyTorch."""

import doctest
import math
from fractions import Fraction

import emp_kernels.reference
import numpy as np
import pytest
import torch
from emp_kernels import reference
from hypothesis import given, settings
from hypothesis import strategies as st

import emp_llm.rule
from emp_llm.errors import OptionError
from emp_llm.rule import effective_number, keep_mask

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def by_numpy(scores, beta):
    return reference.keep_mask(np.array(scores, np.float64), beta).tolist()


def by_torch(scores, beta):
    return keep_mask(torch.tensor(scores, dtype=torch.float64), beta=beta).tolist()


both = pytest.mark.parametrize("mask", [by_numpy, by_torch])


@pytest.mark.parametrize(
    ("scores", "n_eff"),
    [
        ([1, 1, 1, 1], 4.0),
        ([3, 1, 0, 0], 1.6),
        ([1, 2, 3, 4], 10 / 3),  # 100 / 30
        ([0, 0, 5, 0], 1.0),
        ([0, 0, 0, 0], 0.0),
        ([4, 4, 0, 0], 2.0),
    ],
)
def test_effective_numbers_worked_out_by_hand(scores, n_eff):
    assert reference.effective_number(np.array(scores, float)) == pytest.approx(n_eff, rel=1e-15)
    assert effective_number(torch.tensor(scores)).item() == pytest.approx(n_eff, rel=1e-15)


@both
@pytest.mark.parametrize(
    ("scores", "beta", "kept"),
    [
        ([1, 2, 3, 4], 1.0, [0, 1, 1, 1]),  # 3.33
        ([1, 2, 3, 4], 0.8, [0, 0, 1, 1]),  # 2.67
        ([4, 3, 2, 1], 0.5, [1, 0, 0, 0]),  # 1.67
        ([4, 3, 2, 1], 0.01, [1, 0, 0, 0]),  # one at least
        ([4, 3, 2, 1], 1e308, [1, 1, 1, 1]),
        ([3, 1, 0, 0], 5.0, [1, 1, 1, 1]),  # 8: zeros are kept as well
        ([0, 0, 0, 0], 5.0, [0, 0, 0, 0]),
        ([0, 0, 5, 0], 1.0, [0, 0, 1, 0]),
        ([6], 1.0, [1]),
        ([0], 1.0, [0]),
    ],
)
def test_masks_worked_out_by_hand(mask, scores, beta, kept):
    assert mask(scores, beta) == [bool(flag) for flag in kept]


@both
def test_of_equal_scores_the_lower_index_is_kept(mask):
    # N_eff = 81 / 15 = 5.4, of which 0.4 is 2.16 and 0.8 is 4.32
    assert mask([1, 2, 1, 2, 1, 2], 0.4) == [False, True, False, True, False, False]
    assert mask([1, 2, 1, 2, 1, 2], 0.8) == [True, True, False, True, False, True]


@both
@pytest.mark.parametrize("score", [0.1, 1 / 3, 5e-324, 1e-200, 1.7e308])
def test_equal_scores_are_all_kept(mask, score):
    assert all(mask([score] * 77, 1.0))


@pytest.mark.parametrize("scale", [1e200, 1e-200, 2.0**1000, 2.0**-1060])
def test_scale_changes_nothing(scale):
    scores = np.array([1.0, 2.0, 3.0, 4.0]) * scale
    for found in (
        reference.effective_number(scores),
        effective_number(torch.from_numpy(scores)).item(),
    ):
        assert found == pytest.approx(10 / 3, rel=1e-12 if scale > 1e-300 else 1e-3)
    assert by_numpy(scores, 1.0) == by_torch(scores, 1.0) == [False, True, True, True]


def test_the_smallest_subnormals_are_scores_like_others():
    scores = np.array([1, 2, 3, 4]) * 5e-324
    assert reference.effective_number(scores) == pytest.approx(10 / 3)
    assert effective_number(torch.from_numpy(scores)).item() == pytest.approx(10 / 3)


def test_scores_of_very_different_sizes_neither_overflow_nor_vanish():
    scores = np.array([1e300, 1e-300, 1.0])
    assert reference.effective_number(scores) == 1.0
    assert effective_number(torch.from_numpy(scores)).item() == 1.0


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=str)
def test_scores_may_be_of_any_real_dtype(dtype):
    scores = torch.tensor([[1, 2, 3, 4], [0, 0, 5, 0]], dtype=dtype)
    found = effective_number(scores)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([10 / 3, 1.0], rel=1e-15)
    mask = keep_mask(scores)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[False, True, True, True], [False, False, True, False]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_scores_are_summed_in_float64(dtype):
    # in bfloat16, 1 + 1 + … stops at 256
    assert effective_number(torch.ones(5000, dtype=dtype)).item() == 5000


def test_the_last_dimension_is_the_group_unless_told_otherwise():
    scores = torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    assert effective_number(scores).tolist() == [2.0, 1.0]
    assert keep_mask(scores).tolist() == [[True, True], [True, False]]


def test_groups_may_be_columns():
    scores = torch.tensor([[1.0, 1.0, 9.0], [1.0, 0.0, 9.0]])
    assert effective_number(scores, dim=0).tolist() == [2.0, 1.0, 2.0]
    assert keep_mask(scores, dim=0).tolist() == [[True, True, True], [True, False, True]]


def test_one_group_of_all_keeps_ties_in_row_major_order():
    scores = torch.zeros(4, 4)
    scores[3, 3], scores[1, 2], scores[2, 1], scores[0, 3], scores[3, 0] = 3, 1, 1, 1, 1
    scores[2, 3] = 1
    expected = scores > 0
    expected[3, 0] = expected[2, 3] = False
    # S1 = 8, S2 = 9 + 5 = 14; 0.9 · 64 / 14 = 4.1: the 3 and the first three ones
    assert effective_number(scores, dim=None).item() == pytest.approx(64 / 14)
    assert torch.equal(keep_mask(scores, beta=0.9, dim=None), expected)


def test_dims_may_be_several_in_any_order_and_counted_from_the_end():
    scores = torch.arange(24.0).reshape(2, 3, 4) % 7
    expected = torch.stack(
        [
            torch.from_numpy(reference.keep_mask(scores[:, r].numpy(), 1.0)).reshape(2, 4)
            for r in range(3)
        ],
        dim=1,
    )
    for dim in ((0, 2), (2, 0), [0, -1], (-3, -1)):
        assert torch.equal(keep_mask(scores, dim=dim), expected)
        assert effective_number(scores, dim=dim).shape == (3,)


def test_all_dimensions_at_once_are_the_same_as_none():
    scores = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keep_mask(scores, dim=(0, 1)), keep_mask(scores, dim=None))


def test_a_scalar_is_a_group_of_one():
    assert effective_number(torch.tensor(3.0), dim=None).item() == 1.0
    assert keep_mask(torch.tensor(3.0), dim=None).item() is True
    assert keep_mask(torch.tensor(0.0), dim=None).item() is False


@pytest.mark.parametrize(("shape", "dim"), [((3, 0), -1), ((0,), -1), ((0, 4), 0), ((0, 4), None)])
def test_empty_groups_have_nothing_to_keep(shape, dim):
    found = effective_number(torch.zeros(shape), dim=dim)
    assert torch.equal(found, torch.zeros_like(found))
    assert keep_mask(torch.zeros(shape), dim=dim).shape == shape


@pytest.mark.parametrize(("shape", "dim"), [((0, 4), -1), ((3, 0), 0), ((0, 0), -1)])
def test_no_groups_give_no_numbers(shape, dim):
    assert effective_number(torch.zeros(shape), dim=dim).numel() == 0
    assert keep_mask(torch.zeros(shape), dim=dim).shape == shape


def test_scores_need_not_lie_one_after_the_other():
    scores = torch.rand(6, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keep_mask(scores.T), keep_mask(scores.T.contiguous()))
    assert torch.equal(keep_mask(scores[::2, ::3]), keep_mask(scores[::2, ::3].contiguous()))


def test_gaussian_weights_keep_two_over_pi():
    # (E|w|)² / E w² = 2 / π
    weights = np.random.default_rng(1).standard_normal((16, 4096))
    for mask in (
        keep_mask(torch.from_numpy(np.abs(weights))).numpy(),
        np.array([reference.keep_mask(np.abs(row), 1.0) for row in weights]),
    ):
        assert mask.mean() == pytest.approx(2 / math.pi, abs=0.005)


@pytest.mark.parametrize("value", [-1.0, -1e-300, math.nan, math.inf, -math.inf])
def test_scores_that_are_no_magnitudes_are_refused(value):
    scores = torch.tensor([[1.0, 2.0], [3.0, value]], dtype=torch.float64)
    for function in (effective_number, keep_mask):
        with pytest.raises(OptionError, match="finite and not negative"):
            function(scores)
    for function in (reference.effective_number, lambda s: reference.keep_mask(s, 1.0)):
        with pytest.raises(ValueError, match="finite and not negative"):
            function(scores.numpy())


def test_minus_zero_is_a_zero():
    assert keep_mask(torch.tensor([-0.0, 1.0])).tolist() == [False, True]
    assert effective_number(torch.tensor([-0.0, -0.0])).item() == 0.0


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan, math.inf, -math.inf])
def test_a_beta_out_of_its_range_is_refused(beta):
    with pytest.raises(OptionError, match=r"beta is .*finite number above 0"):
        keep_mask(torch.ones(3), beta=beta)


@pytest.mark.parametrize("dim", [2, -3, (0, 5), (0, 0), (1, -1)])
def test_a_dimension_that_is_not_there_or_there_twice_is_refused(dim):
    for function in (effective_number, keep_mask):
        with pytest.raises(OptionError, match="dim is "):
            function(torch.ones(2, 2), dim=dim)


def test_a_scalar_has_no_last_dimension():
    with pytest.raises(OptionError, match="scores have 0 dimensions"):
        keep_mask(torch.tensor(1.0))


@pytest.mark.parametrize("module", [emp_llm.rule, emp_kernels.reference], ids=lambda m: m.__name__)
def test_the_examples_in_the_docstrings_run(module):
    outer = {"torch": torch, "np": np}
    result = doctest.testmod(module, extraglobs=outer)
    assert result.attempted >= 2
    assert result.failed == 0


scores_lists = st.lists(
    st.one_of(
        st.sampled_from([0.0, 0.5, 1.0]),
        st.floats(0, allow_nan=False, allow_infinity=False),
        st.floats(0, 100),
    ),
    min_size=1,
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(scores_lists, st.floats(0.01, 4))
def test_pytorch_keeps_what_the_reference_keeps(scores, beta):
    assert by_torch(scores, beta) == by_numpy(scores, beta)
    assert effective_number(torch.tensor(scores, dtype=torch.float64)).item() == pytest.approx(
        reference.effective_number(np.array(scores)), rel=1e-12
    )


@settings(max_examples=150, deadline=None)
@given(scores_lists, st.floats(0.01, 4))
def test_the_reference_keeps_what_the_definition_in_exact_fractions_keeps(scores, beta):
    exact = [Fraction(score) for score in scores]
    s1, s2 = sum(exact), sum(score**2 for score in exact)
    count = 0
    if s2:
        count = math.floor(Fraction(beta) * (s1**2 / s2) * Fraction(1 + 1e-9))
        count = min(len(scores), max(1, count))
    order = sorted(range(len(scores)), key=lambda i: (-exact[i], i))
    mask = by_numpy(scores, beta)
    assert [i for i, kept in enumerate(mask) if kept] == sorted(order[:count])


@settings(max_examples=100, deadline=None)
@given(scores_lists)
def test_the_effective_number_lies_between_one_and_the_number_of_scores_above_zero(scores):
    n_eff = reference.effective_number(np.array(scores))
    nonzero = sum(score > 0 for score in scores)
    assert (n_eff == 0) == (nonzero == 0)
    if nonzero:
        assert 1 - 1e-12 <= n_eff <= nonzero + 1e-12 * nonzero
