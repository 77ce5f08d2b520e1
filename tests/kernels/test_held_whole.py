"""Whole records are multiplied and unpacked as they lie in memory.

R rows of C weights, T tokens; w are the weights, x activations, as float64.
"""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from emp_kernels.dispatch import pack_whole, unpack_whole
from emp_kernels.errors import DamagedRowError
from emp_kernels.held_dispatch import (
    gather_whole,
    hold_whole,
    multiply_whole,
    unpack_held_whole,
)
from emp_kernels.numbers import BF16, F16
from emp_kernels.whole_layout import WholeLayout
from hypothesis import given, settings
from hypothesis import strategies as st
from support.products import activations, allowed, in_guarded_memory
from support.rows import NUMBER_FORMATS, lists_of, make_rows, to_bits, to_floats
from support.whole_tensors import tensors

IMPLS = ("reference", "scalar", "simd")

formats = pytest.mark.parametrize("number_format", NUMBER_FORMATS, ids=lambda f: f.name)
impls = pytest.mark.parametrize("impl", IMPLS)


def held_whole(weights, layout, impl):
    """Weights [R, C] packed and held."""
    packed = pack_whole(weights, layout, impl="scalar")
    payload = in_guarded_memory(packed.payload)
    return hold_whole(payload, packed.lengths, layout, *weights.shape, impl=impl)


def usual(number_format, columns, record_rows, widths=(2, 1, 1, 2), **options):
    """A layout of which all weights around 0.02 have codes, but for the smallest ones."""
    largest = 9 if number_format is F16 else 121
    room = sum((1 << width) - 1 for width in widths)
    return WholeLayout(
        number_format=number_format,
        weights=columns * record_rows,
        widths=widths,
        exponents=lists_of(range(largest, largest - room, -1)),
        **options,
    )


def assert_product_is_right(held, weights, x, bias, impl, **options):
    number_format = held.number_format
    out = np.full((len(x), held.rows), 0xFFFF, number_format.storage)
    multiply_whole(held, x, out, bias, impl=impl, **options)
    w, tokens = to_floats(weights, number_format), to_floats(x, number_format)
    exact = tokens @ w.T + (0 if bias is None else to_floats(bias, number_format))
    error = np.abs(to_floats(out, number_format) - exact)
    assert (error <= allowed(w, tokens, exact, number_format)).all()
    return out


def assert_rows_come_back(held, weights, impl, *, seed=0):
    """All rows, some consecutive ones, and some in any order."""
    rng = np.random.default_rng(seed)
    first, stop = sorted(rng.integers(0, held.rows + 1, 2).tolist())
    for start, end in ((0, held.rows), (first, stop)):
        out = np.full((end - start, held.columns), 0xFFFF, weights.dtype)
        unpack_held_whole(held, start, end, out, impl=impl)
        np.testing.assert_array_equal(out, weights[start:end])
    rows = rng.integers(0, held.rows, 4)
    out = np.full((4, held.columns), 0xFFFF, weights.dtype)
    gather_whole(held, rows, out, impl=impl)
    np.testing.assert_array_equal(out, weights[rows])


@settings(max_examples=50, deadline=None)
@given(tensors(), st.data())
def test_rows_of_any_layout_come_back_bit_for_bit(tensor, data):
    layout, weights = tensor
    divisors = [c for c in range(1, layout.weights + 1) if layout.weights % c == 0]
    columns = data.draw(st.sampled_from(divisors))
    if weights.size < columns:
        weights = np.resize(weights, columns)
    weights = weights[: weights.size // columns * columns].reshape(-1, columns)
    for impl in IMPLS:
        held = held_whole(weights, layout, impl)
        assert_rows_come_back(held, weights, impl, seed=weights.size)


@formats
@pytest.mark.parametrize("impl", ["scalar", "simd"])
@pytest.mark.parametrize("widths", [(2, 1, 1, 2), (1,), (3, 3), (2, 1, 1, 1, 1, 1, 2, 3)], ids=str)
def test_rows_of_long_records_come_back(number_format, widths, impl):
    if number_format is F16 and sum((1 << w) - 1 for w in widths) > 10:
        widths = (2, 2, 2)
    for columns, record_rows in ((320, 5), (191, 9), (1, 600)):
        layout = usual(number_format, columns, record_rows, widths)
        weights = make_rows("gaussian", number_format, (3 * record_rows - 1, columns))
        held = held_whole(weights, layout, impl)
        for seed in range(3):
            assert_rows_come_back(held, weights, impl, seed=seed)


@formats
@impls
@pytest.mark.parametrize("columns", [1, 31, 64, 100, 128, 192, 576])
def test_products_of_any_number_of_tokens_are_right(number_format, columns, impl):
    layout = usual(number_format, columns, 3)
    weights = make_rows("gaussian", number_format, (8, columns))
    held = held_whole(weights, layout, impl)
    for tokens in (1, 2, 3, 4, 5, 8, 11, 16):
        x = activations(number_format, (tokens, columns))
        bias = activations(number_format, (8,)) if tokens % 2 else None
        assert_product_is_right(held, weights, x, bias, impl)


@formats
@impls
@pytest.mark.parametrize("kind", ["heavy tailed", "subnormal", "all zero", "ties", "an outlier"])
def test_products_of_all_kinds_of_rows_are_right(number_format, kind, impl):
    for dropped_bits in (0, 3):
        weights = make_rows(kind, number_format, (4, 128))
        held = held_whole(weights, usual(number_format, 128, 2, dropped_bits=dropped_bits), impl)
        for tokens in (1, 2):
            x = activations(number_format, (tokens, 128))
            x = to_bits(to_floats(x, number_format) / 8, number_format)
            assert_product_is_right(held, weights, x, None, impl)


@formats
@impls
def test_weights_that_are_not_finite_spoil_their_rows_only(number_format, impl):
    one, infinity = to_bits(np.ones(1), number_format)[0], number_format.infinity
    sign = 1 << (number_format.bits - 1)
    for columns in (64, 100):
        weights = np.full((6, columns), one)
        weights[1, 3] = infinity
        weights[2, columns - 1] = sign | infinity
        weights[3, 0] = infinity + 1
        weights[4, [7, columns - 2]] = infinity, sign | infinity
        weights[5, :] = sign  # −0.0
        held = held_whole(weights, usual(number_format, columns, 4), impl)
        for tokens in (1, 3):
            x = np.full((tokens, columns), one)
            out = np.full((tokens, 6), 0xFFFF, number_format.storage)
            multiply_whole(held, x, out, impl=impl)
            expected = [columns, np.inf, -np.inf, np.nan, np.nan, 0]
            np.testing.assert_array_equal(to_floats(out, number_format), [expected] * tokens)


@pytest.fixture(scope="module")
def large():
    """Rows that are shared out: their layout, patterns, activations."""
    layout = usual(BF16, 512, 4)
    return layout, make_rows("gaussian", BF16, (500, 512)), activations(BF16, (3, 512))


@pytest.mark.parametrize("impl", ["scalar", "simd"])
def test_any_number_of_threads_gives_the_same_bits(large, impl):
    layout, weights, x = large
    held = held_whole(weights, layout, impl)
    for tokens in (x, x[:1]):
        alone = assert_product_is_right(held, weights, tokens, None, impl, threads=1)
        for threads in (2, 3, 8, None):
            out = assert_product_is_right(held, weights, tokens, None, impl, threads=threads)
            np.testing.assert_array_equal(out, alone)
    unpacked = np.empty_like(weights)
    for threads in (1, 2, 3, 8, None):
        unpacked[:] = 0xFFFF
        unpack_held_whole(held, 0, 500, unpacked, threads, impl=impl)
        np.testing.assert_array_equal(unpacked, weights)
        unpacked[:] = 0xFFFF
        gather_whole(held, np.arange(500)[::-1].copy(), unpacked, threads, impl=impl)
        np.testing.assert_array_equal(unpacked, weights[::-1])


def test_several_python_threads_multiply_at_once(large):
    layout, weights, _ = large
    held = held_whole(weights, layout, "simd")
    tokens = [activations(BF16, (1 + i % 4, 512), seed=i) for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        list(
            pool.map(
                lambda x: assert_product_is_right(held, weights, x, None, "simd", threads=2), tokens
            )
        )


@impls
def test_a_part_is_of_the_same_memory(large, impl):
    layout, weights, x = large
    held = held_whole(weights[:20], layout, impl)
    part = held.part(3, 18).part(2, 12)
    assert part.payload is held.payload
    assert part.rows == 10
    for tokens in (x, x[:1]):
        assert_product_is_right(part, weights[5:15], tokens, None, impl)
    assert_rows_come_back(part, weights[5:15], impl)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda held: pickle.loads(pickle.dumps(held))])  # noqa: S301
def test_a_copy_works_without_the_original(large, copied):
    layout, weights, x = large
    held = held_whole(weights[:20], layout, "scalar")
    assert_product_is_right(held, weights[:20], x, None, "auto")
    other = copied(held)
    held.payload[:] = 0xFF
    assert_product_is_right(other, weights[:20], x, None, "auto")


@impls
def test_damaged_records_are_refused_as_by_unpacking(large, impl):
    layout, weights, _ = large
    packed = pack_whole(weights[:20], layout, impl="scalar")
    rng = np.random.default_rng(0)
    found = set()
    for record in range(5):
        at = int(packed.lengths[:record].sum()) + 2048  # behind the values
        for _ in range(4):
            payload = packed.payload.copy()
            payload[at + int(rng.integers(packed.lengths[record] - 2048))] ^= 1 << 3
            refused = []
            for check in (
                lambda data: unpack_whole(
                    data, packed.lengths, layout, np.empty(10240, np.uint16), impl="reference"
                ),
                lambda data: hold_whole(data, packed.lengths, layout, 20, 512, impl=impl),
            ):
                try:
                    check(payload)
                    refused.append(None)
                except DamagedRowError as error:
                    refused.append((error.row, error.fault))
            assert refused[0] == refused[1]
            found.add(refused[0])
    assert {what[0] for what in found if what} == set(range(5))


def test_what_does_not_fit_is_refused(large):
    layout, weights, x = large
    packed = pack_whole(weights[:20], layout, impl="scalar")
    payload, lengths = packed.payload.copy(), packed.lengths
    for rows, columns in ((20, 500), (24, 512), (20, 0), (-1, 512)):
        with pytest.raises(ValueError, match="do not hold"):
            hold_whole(payload, lengths, layout, rows, columns)
    with pytest.raises(ValueError, match="one behind the other"):
        hold_whole(np.zeros(2 * payload.size, np.uint8)[::2], lengths, layout, 20, 512)
    with pytest.raises(DamagedRowError, match="is impossible"):
        hold_whole(payload, lengths * 4, layout, 20, 512)
    held = hold_whole(payload, lengths, layout, 20, 512)
    with pytest.raises(ValueError, match="do not fit"):
        multiply_whole(held, x[:, :511], np.empty((3, 20), np.uint16))
    with pytest.raises(ValueError, match="rows 1 to 21 are asked for, there are 20"):
        unpack_held_whole(held, 1, 21, np.empty((20, 512), np.uint16))
    with pytest.raises(IndexError, match="rows must be from 0 to 19"):
        gather_whole(held, np.array([20]), np.empty((1, 512), np.uint16))


@impls
def test_no_rows_are_no_work(large, impl):
    layout, weights, _ = large
    held = held_whole(weights[:8], layout, impl)
    none = np.empty((0, 512), np.uint16)
    unpack_held_whole(held, 3, 3, none, impl=impl)
    gather_whole(held, np.empty(0, np.int64), none, impl=impl)
    multiply_whole(held, none, np.empty((0, 8), np.uint16), impl=impl)
    multiply_whole(held.part(4, 4), weights[:1], np.empty((1, 0), np.uint16), impl=impl)
