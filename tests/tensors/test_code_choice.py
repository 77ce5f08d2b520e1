"""Tests of the code that is chosen for a tensor that is not pruned."""

from collections import Counter
from itertools import chain, product

import numpy as np
import pytest
from emp_kernels.dispatch import pack_whole, unpack_whole
from emp_kernels.numbers import BF16, F16, F32, NumberFormat
from emp_kernels.rows import Counts, Patterns
from emp_kernels.whole_layout import WholeLayout
from support.rows import NUMBER_FORMATS, make_rows, to_bits

from emp_llm.tensors.code_choice import choose_code, read_sample, record_rows, sample_places
from emp_llm.tensors.geometry import RowBlock, WholeGeometry

ESCAPE_BITS = 8  # of bfloat16 with nothing dropped

formats = pytest.mark.parametrize("number_format", NUMBER_FORMATS, ids=lambda f: f.name)


def geometry_of(rows: Patterns, number_format: NumberFormat) -> WholeGeometry:
    return WholeGeometry(
        number_format=number_format, shape=rows.shape, record_rows=record_rows(rows.shape[1])
    )


def chosen(rows: Patterns, number_format: NumberFormat) -> WholeLayout | None:
    geometry = geometry_of(rows, number_format)
    sample = read_sample(geometry, lambda block: rows[block.start : block.stop])
    return choose_code(sample, geometry)


def packed_bytes(rows: Patterns, layout: WholeLayout | None) -> int:
    """Bytes of the records, from which every bit comes back."""
    assert layout is not None
    packed = pack_whole(rows, layout)
    payload, out = packed.payload.copy(), np.empty_like(rows)
    unpack_whole(payload, packed.lengths, layout, out)
    np.testing.assert_array_equal(out, rows)
    return payload.size


def exponents_to_rows(exponents: Counts) -> Patterns:
    """bf16 weights of such exponents, in random order, with random signs and mantissas."""
    rng = np.random.default_rng(0)
    mixed = rng.permutation(exponents).astype(np.uint16)
    noise = rng.integers(0, 256, mixed.size).astype(np.uint16)
    return (mixed << 7 | noise & 127 | noise >> 7 << 15).reshape(16, -1)


@pytest.mark.parametrize(
    "counts",
    [
        [4096, 2048, 1024, 512, 256, 128, 64, 32, 16, 16],
        [1200, 1100, 1000, 900, 800, 700, 600, 500, 400, 300, 200, 100, 292, 100],
        [8100, 20, 20, 20, 8, 8, 8, 8],
        [8192],
    ],
)
def test_no_other_tiers_take_fewer_bits(counts: list[int]) -> None:
    rows = exponents_to_rows(np.repeat(np.arange(100, 100 + len(counts)), counts))
    layout = chosen(rows, BF16)
    assert layout is not None

    by_context = counts_of(rows)
    every = chain.from_iterable(product((1, 2, 3), repeat=tiers) for tiers in range(1, 9))
    fewest = min(bits_of(by_context, widths) for widths in every)
    assert bits_of(by_context, layout.widths) == fewest


def counts_of(rows: Patterns) -> list[Counter[int]]:
    """Of each context the number of weights with each exponent, bf16."""
    found = [Counter[int]() for _ in range(4)]
    for bits in rows.reshape(-1).tolist():
        found[bits % 128 // 32][bits // 128 % 256] += 1
    return found


def bits_of(by_context: list[Counter[int]], widths: tuple[int, ...]) -> int:
    """Bits of tiers and escapes if each context has its frequent exponents first."""
    symbols = sum(2**width - 1 for width in widths)
    listed = {exponent for exponent, _ in sum(by_context, Counter[int]()).most_common(symbols)}
    bits = 0
    for counts in by_context:
        left = counts.total()
        ordered = sorted((counts[exponent] for exponent in listed), reverse=True)
        for width in widths:
            bits += width * left
            left -= sum(ordered[: 2**width - 1])
            del ordered[: 2**width - 1]
        bits += ESCAPE_BITS * left
    return bits


def test_each_context_has_its_frequent_exponents_first() -> None:
    # by context, how many weights have the exponents 120, 121, 122 and 123
    counts = [[512, 0, 0, 512], [256, 256, 1024, 512], [0, 768, 0, 256], [16, 32, 0, 512]]
    exponents = np.repeat([120, 121, 122, 123] * 4, np.ravel(counts))
    mantissas = np.repeat([0, 32, 64, 96], [sum(one) for one in counts])
    rows = (exponents << 7 | mantissas).astype(np.uint16).reshape(16, -1)
    layout = chosen(rows, BF16)
    assert layout is not None
    assert [one[:4] for one in layout.exponents] == [
        (120, 123, 121, 122),
        (122, 123, 120, 121),
        (121, 123, 120, 122),
        (123, 121, 120, 122),
    ]


@pytest.mark.parametrize(("mantissa_bits", "lists"), [(2, 4), (1, 2), (0, 1)])
def test_there_are_lists_for_the_bits_that_are_stored(mantissa_bits: int, lists: int) -> None:
    rng = np.random.default_rng(0)
    rows = to_bits(rng.standard_normal((64, 1024)), BF16)
    shift = 7 - mantissa_bits
    rows = rows >> shift << shift
    layout = chosen(rows, BF16)
    assert layout is not None
    assert len(layout.exponents) == lists
    packed_bytes(rows, layout)


def test_gaussian_weights_take_less_than_with_the_entropy_of_their_exponents() -> None:
    rows = make_rows("gaussian", BF16, (1024, 1024))
    counts = sum(counts_of(rows), Counter[int]())
    shares = np.array(list(counts.values())) / rows.size
    entropy = -(shares * np.log2(shares)).sum()
    assert packed_bytes(rows, chosen(rows, BF16)) * 8 / rows.size < 8 + entropy


def test_the_list_starts_with_the_frequent_exponents() -> None:
    rows = exponents_to_rows(np.repeat([120, 121, 119, 7], [1024, 4096, 3000, 72]))
    layout = chosen(rows, BF16)
    assert layout is not None
    assert [one[:3] for one in layout.exponents] == [(121, 119, 120)] * 4


def test_float32_that_was_bfloat16_drops_sixteen_bits() -> None:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((64, 1024), np.float32).view(np.uint32)
    layout = chosen(rows >> 16 << 16, F32)
    assert layout is not None
    assert layout.dropped_bits == 16
    layout = chosen(rows, F32)
    assert layout is not None
    assert layout.dropped_bits == 0


def test_one_weight_in_sixty_four_may_escape_for_its_dropped_bits() -> None:
    rng = np.random.default_rng(2)
    rows = rng.standard_normal((64, 1024), np.float32).view(np.uint32) >> 16 << 16
    rows[:, :16] |= 1
    layout = chosen(rows, F32)
    assert layout is not None
    assert layout.dropped_bits == 16
    rows[:, 16] |= 1
    layout = chosen(rows, F32)
    assert layout is not None
    assert layout.dropped_bits == 0


@formats
def test_random_bits_stay_plain(number_format: NumberFormat) -> None:
    noise = np.random.default_rng(3).integers(0, 1 << number_format.bits, (64, 1024))
    assert chosen(noise.astype(number_format.storage), number_format) is None


def test_gaussian_weights_take_about_as_many_bits_as_their_entropy() -> None:
    rows = make_rows("gaussian", BF16, (64, 4096))
    _, counts = np.unique(rows >> 7 & 255, return_counts=True)
    share = counts / counts.sum()
    entropy = -(share * np.log2(share)).sum()
    bits = packed_bytes(rows, chosen(rows, BF16)) * 8 / rows.size
    assert 8 + entropy < bits < 8 + entropy + 0.2


@pytest.mark.parametrize(("number_format", "dropped"), [(F16, 3), (F32, 16)])
def test_weights_that_were_bfloat16_pack_like_bfloat16(
    number_format: NumberFormat, dropped: int
) -> None:
    was = to_bits(np.random.default_rng(0).standard_normal((32, 4096)), BF16)
    rows = to_bits((was.astype(np.uint32) << 16).view(np.float32), number_format)
    layout = chosen(rows, number_format)
    assert layout is not None
    assert layout.dropped_bits == dropped
    expected = packed_bytes(was, chosen(was, BF16))
    assert packed_bytes(rows, layout) == pytest.approx(expected, rel=0.002)


@formats
@pytest.mark.parametrize("what", ["zero", "one", "NaN", "zero of both signs"])
def test_a_constant_takes_a_bit_for_the_sign_and_one_for_the_exponent(
    number_format: NumberFormat, what: str
) -> None:
    one = to_bits(np.ones(1), number_format)[0]
    value = {"one": one, "NaN": number_format.infinity + 1}.get(what, 0)
    rows = np.full((16, 4096), value, number_format.storage)
    if what == "zero of both signs":
        rows[::2] = 1 << (number_format.bits - 1)
    stripes = 2 + (number_format.mantissa_bits if what == "NaN" else 0)
    assert packed_bytes(rows, chosen(rows, number_format)) == stripes * rows.size // 8


def test_weights_that_are_all_nan_come_back_with_their_payloads() -> None:
    payloads = np.random.default_rng(0).integers(1, 1 << 7, (16, 4096)).astype(np.uint16)
    rows = payloads | 0x7F80
    assert packed_bytes(rows, chosen(rows, BF16)) == rows.size * 9 // 8


@formats
def test_the_choice_depends_on_nothing_but_the_weights(number_format: NumberFormat) -> None:
    rows = make_rows("heavy tailed", number_format, (20, 1000))
    assert chosen(rows, number_format) == chosen(rows.copy(), number_format)


def test_of_two_exponents_as_frequent_the_smaller_is_first() -> None:
    exponents = np.repeat(np.array([126, 119, 125, 120], np.uint16), 4096)
    rows = (exponents << 7 | np.arange(exponents.size, dtype=np.uint16) % 128).reshape(16, -1)
    layout = chosen(rows, BF16)
    assert layout is not None
    assert [one[:4] for one in layout.exponents] == [(119, 120, 125, 126)] * 4


@formats
@pytest.mark.parametrize("outside", ["random", "constant"])
def test_rows_unlike_those_of_the_sample_come_back_and_grow_little(
    number_format: NumberFormat, outside: str
) -> None:
    # the sample has 64 times two rows, which are two of every eight
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 1 << number_format.bits, (64 * 8, 512)).astype(number_format.storage)
    if outside == "constant":
        rows[:] = to_bits(np.full(1, 77.0), number_format)[0]
    sampled = np.arange(64 * 8) // 2 % 4 == 0
    rows[sampled] = to_bits(rng.standard_normal((128, 512)), number_format)
    geometry = geometry_of(rows, number_format)
    sample = read_sample(geometry, lambda block: rows[block.start : block.stop])
    np.testing.assert_array_equal(sample, rows[sampled])
    layout = choose_code(sample, geometry)
    assert layout is not None
    # what escapes takes all tiers and a byte more, where it had an exponent of 5 or 8 bits
    assert packed_bytes(rows, layout) < rows.nbytes * (1 + (sum(layout.widths) + 3) / 16)


def test_places_of_the_sample_are_spread_over_all_rows() -> None:
    geometry = WholeGeometry(number_format=BF16, shape=(6400, 512), record_rows=record_rows(512))
    places = sample_places(geometry)
    assert [place.start for place in places] == [100 * i for i in range(64)]
    assert {place.stop - place.start for place in places} == {2}


def test_a_sample_of_few_rows_is_all_of_them() -> None:
    geometry = WholeGeometry(number_format=BF16, shape=(5, 512), record_rows=32)
    assert sample_places(geometry) == [RowBlock(0, 0, 2), RowBlock(0, 2, 4), RowBlock(0, 4, 5)]


@pytest.mark.parametrize(
    ("columns", "rows"), [(1, 16384), (12, 1366), (16383, 2), (16384, 1), (16385, 1), (2**22, 1)]
)
def test_a_record_has_whole_rows_and_16384_weights_or_more(columns: int, rows: int) -> None:
    assert record_rows(columns) == rows
