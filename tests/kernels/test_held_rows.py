"""Packed rows are multiplied and unpacked as they lie in memory.

R rows of C weights, T tokens; w are the weights that were kept, x activations, as float64.
"""

import copy
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle

import numpy as np
import pytest
from emp_kernels import reference
from emp_kernels.dispatch import pack_rows
from emp_kernels.held_dispatch import gather_rows, hold_rows, multiply_rows, unpack_held_rows
from emp_kernels.layout import RADICES, RowLayout
from emp_kernels.numbers import BF16, F16
from emp_kernels.rows import Given, PerRow
from support.products import activations, allowed, in_guarded_memory
from support.rows import (
    NUMBER_FORMATS,
    make_rows,
    to_bits,
    to_floats,
    zeros_elsewhere,
)

IMPLS = ("reference", "scalar", "simd")
COLUMNS = (1, 7, 8, 31, 64, 65, 127, 193, 320, 511)

formats = pytest.mark.parametrize("number_format", NUMBER_FORMATS, ids=lambda f: f.name)
impls = pytest.mark.parametrize("impl", IMPLS)


def held_rows(weights, layout, rule, impl):
    """Rows packed by a rule and held, and their patterns with zeros where nothing was kept."""
    packed = pack_rows(weights, layout, rule, impl="scalar")
    held = hold_rows(in_guarded_memory(packed.payload), packed.table, layout, impl=impl)
    if isinstance(rule, Given):
        keep = np.unpackbits(rule.mask, axis=1, count=layout.columns, bitorder="little") > 0
    else:
        scores = np.abs(to_floats(weights, layout.number_format))
        keep = np.array([reference.keep_mask(row, rule.beta) for row in scores])
    return held, zeros_elsewhere(weights, keep)


def assert_product_is_right(held, dense, x, bias, impl, **options):
    number_format = held.layout.number_format
    out = np.full((len(x), held.rows), 0xFFFF, number_format.storage)
    multiply_rows(held, x, out, bias, impl=impl, **options)
    w, tokens = to_floats(dense, number_format), to_floats(x, number_format)
    exact = tokens @ w.T + (0 if bias is None else to_floats(bias, number_format))
    error = np.abs(to_floats(out, number_format) - exact)
    assert (error <= allowed(w, tokens, exact, number_format)).all()
    return out


@formats
@impls
def test_products_are_those_of_the_kept_weights_in_all_layouts(number_format, impl):
    tokens, aligns, betas = cycle((1, 2, 3, 5, 8, 16)), cycle((1, 16, 4, 64)), cycle((0.7, 1.0))
    dropped, with_bias = cycle((0, 0, 0, 3)), cycle((True, False))
    for columns in COLUMNS:
        for radix in RADICES:
            layout = RowLayout(
                number_format=number_format,
                columns=columns,
                radix=radix,
                align=next(aligns),
                dropped_bits=next(dropped),
            )
            weights = make_rows("heavy tailed", number_format, (3, columns), seed=radix)
            held, dense = held_rows(weights, layout, PerRow(next(betas)), impl)
            x = activations(number_format, (next(tokens), columns))
            bias = activations(number_format, (3,)) if next(with_bias) else None
            assert_product_is_right(held, dense, x, bias, impl)


@formats
@impls
def test_rows_are_unpacked_and_gathered_bit_for_bit_in_all_layouts(number_format, impl):
    aligns, dropped = cycle((1, 16, 4, 64)), cycle((0, 0, 0, 3, number_format.mantissa_bits))
    for columns in COLUMNS:
        for radix in RADICES:
            layout = RowLayout(
                number_format=number_format,
                columns=columns,
                radix=radix,
                align=next(aligns),
                dropped_bits=next(dropped),
            )
            weights = make_rows("any finite bits", number_format, (4, columns), seed=radix)
            held, dense = held_rows(weights, layout, PerRow(1.0), impl)
            out = np.full_like(dense, 0xFFFF)
            unpack_held_rows(held, 1, 4, out[1:], impl=impl)
            np.testing.assert_array_equal(out[1:], dense[1:])
            rows = np.array([3, 0, 0, 2], np.int64)
            gather_rows(held, rows, out, impl=impl)
            np.testing.assert_array_equal(out, dense[rows])


@formats
@impls
def test_rows_that_keep_all_or_nothing_have_no_mask(number_format, impl):
    keep = np.zeros((4, 70), np.uint8)
    keep[[0, 3]] = 1
    keep[2, 69] = 1
    rule = Given(np.packbits(keep, axis=1, bitorder="little"))
    layout = RowLayout(number_format=number_format, columns=70)
    weights = make_rows("gaussian", number_format, (4, 70))
    held, dense = held_rows(weights, layout, rule, impl)
    out = np.full_like(dense, 0xFFFF)
    unpack_held_rows(held, 0, 4, out, impl=impl)
    np.testing.assert_array_equal(out, dense)
    assert_product_is_right(held, dense, activations(number_format, (2, 70)), None, impl)


@formats
@impls
@pytest.mark.parametrize("kind", ["subnormal", "all zero", "ties", "an outlier"])
def test_products_of_all_kinds_of_rows_are_right(number_format, kind, impl):
    weights = make_rows(kind, number_format, (3, 130))
    layout = RowLayout(number_format=number_format, columns=130)
    held, dense = held_rows(weights, layout, PerRow(1.0), impl)
    x = to_bits(to_floats(activations(number_format, (2, 130)), number_format) / 8, number_format)
    assert_product_is_right(held, dense, x, None, impl)


@formats
@impls
def test_infinite_and_nan_activations_go_where_they_must(number_format, impl):
    layout = RowLayout(number_format=number_format, columns=3)
    weights = to_bits(np.array([[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]), number_format)
    held, _ = held_rows(weights, layout, PerRow(1.0), impl)
    x = to_bits(np.array([[1.0, 2.0, 3.0]] * 3), number_format)
    x[1, 2] = number_format.infinity
    x[2, 0] = number_format.infinity + 1
    out = np.empty((3, 2), number_format.storage)
    multiply_rows(held, x, out, impl=impl)
    np.testing.assert_array_equal(
        to_floats(out, number_format), [[6, 12], [np.inf, np.inf], [np.nan, np.nan]]
    )


@pytest.mark.parametrize("number_format", [BF16, F16], ids=lambda f: f.name)
@impls
def test_sums_are_rounded_to_the_nearest_or_the_even_number(number_format, impl):
    """One weight of 1, and activations of 1 with biases around half a step."""
    layout = RowLayout(number_format=number_format, columns=1)
    step = 2.0**-number_format.mantissa_bits
    bias = to_bits(np.array([0.5, 0.75, 1.5, 0.25]) * step, number_format)
    held, _ = held_rows(to_bits(np.ones((4, 1)), number_format), layout, PerRow(1.0), impl)
    out = np.empty((1, 4), number_format.storage)
    multiply_rows(held, to_bits(np.ones((1, 1)), number_format), out, bias, impl=impl)
    expected = np.array([[1, 1 + step, 1 + 2 * step, 1]])
    np.testing.assert_array_equal(to_floats(out, number_format), expected)


@impls
def test_what_exceeds_fp16_is_infinite_and_what_is_small_is_subnormal(impl):
    layout = RowLayout(number_format=F16, columns=1)
    weights = to_bits(np.array([[65504.0], [2.0**-14], [-65504.0]]), F16)
    held, _ = held_rows(weights, layout, PerRow(1.0), impl)
    out = np.empty((2, 3), np.uint16)
    multiply_rows(held, to_bits(np.array([[1.0], [1.25 * 2.0**-9]]), F16), out, impl=impl)
    assert out[0].tolist() == [0x7BFF, 0x0400, 0xFBFF]
    assert out[1, 1] == 2  # 1.25 · 2⁻²³ are 2.5 steps of 2⁻²⁴: to the even one
    multiply_rows(held, to_bits(np.array([[2.0], [1.0]]), F16), out, impl=impl)
    assert out[0].tolist() == [0x7C00, 0x0800, 0xFC00]


@pytest.fixture(scope="module")
def large():
    """Rows that are shared out: held, their patterns, activations."""
    layout = RowLayout(number_format=BF16, columns=1000, align=16)
    weights = make_rows("gaussian", BF16, (300, 1000))
    held, dense = held_rows(weights, layout, PerRow(1.0), "scalar")
    return held, dense, activations(BF16, (3, 1000))


@pytest.mark.parametrize("impl", ["scalar", "simd"])
def test_any_number_of_threads_gives_the_same_bits(large, impl):
    held, dense, x = large
    alone = assert_product_is_right(held, dense, x, None, impl, threads=1)
    unpacked = np.empty_like(dense)
    for threads in (2, 3, 8, None):
        out = assert_product_is_right(held, dense, x, None, impl, threads=threads)
        np.testing.assert_array_equal(out, alone)
        unpacked[:] = 0xFFFF
        unpack_held_rows(held, 0, 300, unpacked, threads, impl=impl)
        np.testing.assert_array_equal(unpacked, dense)


@pytest.mark.parametrize("impl", ["scalar", "simd"])
def test_several_python_threads_multiply_at_once(large, impl):
    held, dense, _ = large
    tokens = [activations(BF16, (1 + i % 4, 1000), seed=i) for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        outs = list(
            pool.map(
                lambda x: assert_product_is_right(held, dense, x, None, impl, threads=2), tokens
            )
        )
    for x, out in zip(tokens, outs, strict=True):
        np.testing.assert_array_equal(
            out, assert_product_is_right(held, dense, x, None, impl, threads=1)
        )


@impls
def test_a_part_multiplies_its_rows_from_the_same_memory(large, impl):
    held, dense, x = large
    part = held.part(290, 300)
    assert part.payload is held.payload
    assert_product_is_right(part, dense[290:], x, None, impl)
    out = np.empty_like(dense[:2])
    gather_rows(part, np.array([9, 0]), out, impl=impl)
    np.testing.assert_array_equal(out, dense[[299, 290]])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda held: pickle.loads(pickle.dumps(held))])  # noqa: S301
def test_a_copy_works_without_the_original(copied):
    layout = RowLayout(number_format=BF16, columns=100)
    held, dense = held_rows(make_rows("gaussian", BF16, (4, 100)), layout, PerRow(1.0), "scalar")
    x = activations(BF16, (1, 100))
    assert_product_is_right(held, dense, x, None, "auto")
    other = copied(held)
    held.payload[:] = 0xFF
    assert_product_is_right(other, dense, x, None, "auto")


def test_what_does_not_fit_is_refused(large):
    held, _, x = large
    out = np.empty((3, 300), np.uint16)
    for bad in (x[:, :999], x[:2], x.astype(np.uint32), x[0]):
        with pytest.raises(ValueError, match=r"do not fit|must be uint16"):
            multiply_rows(held, bad, out)
    with pytest.raises(ValueError, match="do not fit"):
        multiply_rows(held, x, out, np.empty(299, np.uint16))
    with pytest.raises(ValueError, match="C-contiguous"):
        multiply_rows(held, x, np.empty((300, 3), np.uint16).T)
    with pytest.raises(ValueError, match="rows 1 to 301 are asked for, there are 300"):
        unpack_held_rows(held, 1, 301, np.empty((300, 1000), np.uint16))
    with pytest.raises(IndexError, match="rows must be from 0 to 299"):
        gather_rows(held, np.array([-1]), np.empty((1, 1000), np.uint16))
    with pytest.raises(ValueError, match=r"that must be uint16 \(2, 1000\)"):
        gather_rows(held, np.array([0, 1]), np.empty((1, 1000), np.uint16))
    with pytest.raises(ValueError, match="0 threads are asked for; 1 is the least"):
        multiply_rows(held, x, out, threads=0)
    with pytest.raises(ValueError, match="one behind the other"):
        hold_rows(np.zeros(8, np.uint8)[::2], np.zeros((1, 3), np.int64), held.layout)


WITHOUT_TORCH = """
import sys
import numpy as np
from emp_kernels.dispatch import pack_rows
from emp_kernels.held_dispatch import hold_rows, multiply_rows
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import BF16
from emp_kernels.rows import PerRow
layout = RowLayout(number_format=BF16, columns=500)
packed = pack_rows(np.full((200, 500), 0x3F80, np.uint16), layout, PerRow(1.0))
held = hold_rows(packed.payload.copy(), packed.table, layout)
out = np.zeros((1, 200), np.uint16)
multiply_rows(held, np.full((1, 500), 0x3F80, np.uint16), out, threads=4)
assert "torch" not in sys.modules
assert (out == 0x43FA).all(), out  # 500
"""


def test_without_torch_products_are_made_by_the_calling_thread():
    subprocess.run([sys.executable, "-c", WITHOUT_TORCH], check=True)


FORKED = """
import os
import signal
import torch
import numpy as np
from emp_kernels.dispatch import pack_rows
from emp_kernels.held_dispatch import hold_rows, multiply_rows
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import BF16
from emp_kernels.rows import PerRow
layout = RowLayout(number_format=BF16, columns=500)
packed = pack_rows(np.full((200, 500), 0x3F80, np.uint16), layout, PerRow(1.0))
held = hold_rows(packed.payload.copy(), packed.table, layout)
out = np.zeros((1, 200), np.uint16)
multiply_rows(held, np.full((1, 500), 0x3F80, np.uint16), out, threads=4)
out[:] = 0
child = os.fork()
if not child:
    signal.alarm(20)
    multiply_rows(held, np.full((1, 500), 0x3F80, np.uint16), out, threads=4)
    os._exit(0 if (out == 0x43FA).all() else 1)
assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked here")
def test_a_forked_process_multiplies_on_its_calling_thread():
    subprocess.run([sys.executable, "-c", FORKED], check=True)
