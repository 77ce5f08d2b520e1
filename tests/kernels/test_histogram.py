"""Histograms of magnitudes give the exact sums and the k-th largest of any mixture of formats."""

from fractions import Fraction

import numpy as np
import pytest
from emp_kernels.errors import NonFiniteRowError
from emp_kernels.histogram import (
    BlockHistogram,
    MagnitudeHistogram,
    count_equal,
    count_low_parts,
    native_threshold,
)
from emp_kernels.numbers import BF16, F16, F32
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rows import KINDS, NUMBER_FORMATS, make_rows, to_floats

formats = pytest.mark.parametrize("number_format", NUMBER_FORMATS, ids=lambda f: f.name)

MIXTURES = [(BF16,), (F16,), (F32,), (BF16, BF16), (BF16, F16), (F32, F32), (BF16, F16, F32, F16)]
mixtures = pytest.mark.parametrize(
    "mixture", MIXTURES, ids=lambda mixture: "+".join(f.name for f in mixture)
)


def make_blocks(mixture, kind, seed=0):
    return [
        (make_rows(kind, number_format, (3, 40 + i), seed=seed + i), number_format)
        for i, number_format in enumerate(mixture)
    ]


def histogram_of(blocks):
    histogram = MagnitudeHistogram()
    for weights, number_format in blocks:
        histogram.add(BlockHistogram(weights, number_format))
    return histogram


def magnitudes_of(blocks):
    return np.concatenate([np.abs(to_floats(*block)).ravel() for block in blocks])


def float32_key(magnitude):
    return int(np.float32(magnitude).view(np.uint32))


def kth_key(histogram, blocks, k):
    """The float32 key that the two steps of the search lead to."""
    chosen, rank = histogram.find_bin(k)
    counts, unresolved = histogram.low_parts(chosen)
    if unresolved:
        for weights, number_format in blocks:
            if number_format is F32:
                counts += count_low_parts(weights, chosen)
    return chosen << 16 | int(np.repeat(np.arange(counts.size), counts)[-rank])


@mixtures
@pytest.mark.parametrize("kind", KINDS)
def test_the_sums_are_those_of_fractions(mixture, kind):
    blocks = make_blocks(mixture, kind)
    exact = [Fraction(magnitude) for magnitude in magnitudes_of(blocks).tolist()]
    histogram = histogram_of(blocks)
    assert histogram.sums() == (sum(exact), sum(magnitude**2 for magnitude in exact))
    assert histogram.size == len(exact)


@mixtures
@pytest.mark.parametrize("kind", KINDS)
def test_bin_and_low_part_lead_to_the_kth_largest_magnitude(mixture, kind):
    blocks = make_blocks(mixture, kind)
    histogram = histogram_of(blocks)
    descending = np.sort(magnitudes_of(blocks))[::-1]
    size = descending.size
    for k in (1, 2, size // 3, size // 2, size - 1, size):
        assert kth_key(histogram, blocks, k) == float32_key(descending[k - 1])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(NUMBER_FORMATS), st.sampled_from(KINDS)), min_size=1),
    st.integers(0, 2**32),
    st.data(),
)
def test_any_rank_in_any_mixture_is_found(parts, seed, data):
    blocks = [(make_rows(kind, f, (2, 9), seed=seed + i), f) for i, (f, kind) in enumerate(parts)]
    descending = np.sort(magnitudes_of(blocks))[::-1]
    k = data.draw(st.integers(1, descending.size))
    assert kth_key(histogram_of(blocks), blocks, k) == float32_key(descending[k - 1])


def test_float32_weights_of_one_bin_are_distinguished_by_their_low_parts():
    # 1 + n · 2**-23 for n = 0, 7, 7, 65535 share the upper 16 bits
    weights = np.array([[0x3F800000, 0xBF800007], [0x3F800007, 0x3F80FFFF]], np.uint32)
    histogram = histogram_of([(weights, F32)])
    assert [histogram.find_bin(k) for k in (1, 2, 3, 4)] == [(0x3F80, k) for k in (1, 2, 3, 4)]
    known, unresolved = histogram.low_parts(0x3F80)
    assert (known.sum(), unresolved) == (0, True)
    counts = count_low_parts(weights, 0x3F80)
    assert {int(low): int(counts[low]) for low in np.flatnonzero(counts)} == {0: 1, 7: 2, 65535: 1}
    assert not count_low_parts(weights, 0x3F81).any()


def test_only_bins_with_float32_weights_are_unresolved():
    half = np.array([[0x3C00, 0xBC01]], np.uint16)  # 1 and 1 + 2**-10: low parts 0 and 2**13
    histogram = histogram_of([(half, F16), (np.array([[0x40000000]], np.uint32), F32)])
    counts, unresolved = histogram.low_parts(0x3F80)
    assert (counts[0], counts[1 << 13], counts.sum(), unresolved) == (1, 1, 2, False)
    assert histogram.low_parts(0x4000)[1]


def test_the_order_of_the_blocks_does_not_matter():
    blocks = make_blocks((F32, BF16, F16, F32), "heavy tailed")
    assert histogram_of(blocks).sums() == histogram_of(blocks[::-1]).sums()


def test_sums_of_squares_pass_64_bits_unharmed():
    # 1.0 is 2**23 units of 2**-23, and its bin holds three blocks' low parts
    block = BlockHistogram(np.array([[0x3F800000]], np.uint32), F32)
    block.low_squares[0x3F80] = 2**64 - 1
    histogram = MagnitudeHistogram()
    for _ in range(3):
        histogram.add(block)
    assert histogram.sums()[1] == 3 + Fraction(3 * (2**64 - 1), 2**46)


def test_a_histogram_of_nothing_has_no_sums():
    histogram = MagnitudeHistogram()
    assert histogram.size == 0
    assert histogram.sums() == (0, 0)


@formats
@pytest.mark.parametrize("bad", ["infinity", "key_mask"])
def test_nan_and_infinity_are_refused_with_their_row(number_format, bad):
    weights = make_rows("gaussian", number_format, (4, 9))
    weights[2, 8] = getattr(number_format, bad) | 1 << (number_format.bits - 1)
    with pytest.raises(NonFiniteRowError) as caught:
        BlockHistogram(weights, number_format)
    assert caught.value.row == 2


@formats
def test_the_largest_finite_weight_is_counted(number_format):
    weights = np.full((2, 3), number_format.infinity - 1, number_format.storage)
    exact = Fraction(float(to_floats(weights, number_format)[0, 0]))
    assert histogram_of([(weights, number_format)]).sums() == (6 * exact, 6 * exact**2)


@formats
def test_equal_weights_are_counted_whatever_their_sign(number_format):
    weights = make_rows("ties", number_format, (5, 33))
    values = np.abs(to_floats(weights, number_format))
    for value in (0.0, 1.0, 1.5, 3.0):
        key = {BF16: float32_key(value) >> 16, F32: float32_key(value)}.get(
            number_format, int(np.float16(value).view(np.uint16))
        )
        assert count_equal(weights, number_format, key) == (values == value).sum()


NATIVE = [
    (F32, 0x12345678, 0x12345678, True),
    (BF16, 0x3F800000, 0x3F80, True),
    (BF16, 0x3F800001, 0x3F80, False),
    (BF16, 0x00010000, 1, True),  # the smallest subnormal
    (BF16, 0x0000FFFF, 0, False),
    (BF16, 0, 0, True),
    (BF16, 0x7F7FFFFF, 0x7F7F, False),  # float32's largest
    (F16, 0x3F800000, 0x3C00, True),  # 1
    (F16, 0x3F801FFF, 0x3C00, False),
    (F16, 0x3F802000, 0x3C01, True),  # 1 + 2**-10
    (F16, 0x477FE000, 0x7BFF, True),  # 65504, the largest
    (F16, 0x47800000, 0x7BFF, False),  # 65536
    (F16, 0x38800000, 0x0400, True),  # 2**-14, the smallest normal
    (F16, 0x387FC000, 0x03FF, True),  # 2**-14 − 2**-24, the largest subnormal
    (F16, 0x33800000, 1, True),  # 2**-24, the smallest
    (F16, 0x337FFFFF, 0, False),
    (F16, 0x00000001, 0, False),
    (F16, 0, 0, True),
]


@pytest.mark.parametrize(("number_format", "key", "native", "same"), NATIVE)
def test_thresholds_in_another_format_by_hand(number_format, key, native, same):
    assert native_threshold(number_format, key) == (native, same)


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from([BF16, F16]), st.floats(0, 2.0**17, width=32) | st.floats(0, 2.0**127, width=32)
)
def test_a_native_threshold_parts_weights_as_the_float32_one_does(number_format, magnitude):
    key, same = native_threshold(number_format, float32_key(magnitude))
    around = np.array([key, key + 1], np.uint16)
    below, above = to_floats(around, number_format).tolist()
    assert below <= magnitude < above
    assert same == (below == magnitude)


@formats
@pytest.mark.parametrize("kind", KINDS)
def test_the_kernels_count_as_the_reference_does(number_format, kind):
    weights = make_rows(kind, number_format, (3, 45))
    found, expected = (
        BlockHistogram(weights, number_format, impl=impl) for impl in ("scalar", "reference")
    )
    for name in ("counts", "low_sums", "low_squares"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    key = int(weights[1, 1] & number_format.key_mask)
    found, expected = (
        count_equal(weights, number_format, key, impl=impl) for impl in ("scalar", "reference")
    )
    assert found == expected >= 1
    if number_format is F32:
        found, expected = (
            count_low_parts(weights, key >> 16, impl=impl) for impl in ("scalar", "reference")
        )
        np.testing.assert_array_equal(found, expected)
