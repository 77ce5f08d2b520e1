"""Whole records on a device are multiplied, unpacked and looked up from where they lie."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from emp_kernels.dispatch import pack_whole
from emp_kernels.errors import DamagedRowError
from emp_kernels.gpu_devices import find_devices
from emp_kernels.gpu_held_whole import (
    gather_whole_there,
    hold_whole_there,
    multiply_whole_there,
    unpack_whole_there,
)
from emp_kernels.numbers import BF16, F16, F32, tensor_of_patterns, torch_integers
from emp_kernels.whole_layout import WholeLayout
from support.rows import guarded, lists_of, make_rows, to_floats

interpreter = pytest.mark.interpreter


def layout_of(weights, number_format, widths, record_rows, dropped_bits=0):
    """A code for some weights: the exponents of most of them, and others to fill its lists."""
    exponents = (weights.astype(np.int64) & number_format.key_mask) >> number_format.mantissa_bits
    found, counts = np.unique(exponents, return_counts=True)
    frequent = found[np.argsort(-counts, kind="stable")].tolist()
    others = [e for e in range(32) if e not in frequent]
    room = sum((1 << width) - 1 for width in widths)
    return WholeLayout(
        number_format=number_format,
        weights=record_rows * weights.shape[1],
        widths=widths,
        exponents=lists_of((frequent + others)[:room], number_format.mantissa_bits - dropped_bits),
        dropped_bits=dropped_bits,
    )


def packed(weights, layout):
    """The plane of records, at the end of memory that nothing may be read past, and lengths."""
    rows = pack_whole(weights, layout, impl="reference")
    plane = guarded(-(-rows.payload.size // 16) * 16)
    plane[:] = 0
    plane[: rows.payload.size] = rows.payload
    return torch.from_numpy(plane), rows.lengths.copy()


def held_there(weights, layout):
    plane, lengths = packed(weights, layout)
    device = find_devices()[0]
    plane = plane if device.type == "cpu" else plane.to(device)
    return hold_whole_there(plane, lengths, layout, *weights.shape)


def unpacked(held):
    dtype = held.layout.number_format.torch_dtype
    out = torch.full(held.shape, torch.nan, dtype=dtype, device=held.records.device)
    unpack_whole_there(held, out)
    return patterns(out)


def patterns(tensor):
    return tensor.cpu().view(torch_integers(tensor.itemsize))


def product(held, x, bias=None):
    out = torch.full((len(x), held.rows), torch.nan, dtype=x.dtype, device=x.device)
    multiply_whole_there(held, x, out, bias)
    return out


def inputs_for(held, tokens):
    torch.manual_seed(0)
    dtype, device = held.layout.number_format.torch_dtype, held.records.device
    x = torch.randn(tokens, held.shape[1]).to(device, dtype)
    return x, torch.randn(held.rows).to(device, dtype)


def assert_close(found, weights, x, bias):
    """Within the rounding of a sum in float32 and of its result."""
    dense, wide, added = torch.from_numpy(weights), x.cpu().double(), bias.cpu().double()
    expected = wide @ dense.T + added
    terms = wide.abs() @ dense.abs().T + added.abs()
    bound = torch.finfo(found.dtype).eps / 2 * expected.abs() + 40 * 2**-24 * terms
    assert ((found.cpu().double() - expected).abs() <= bound + 1e-7).all()


@interpreter
@pytest.mark.parametrize(
    ("number_format", "columns", "widths", "dropped_bits"),
    [
        (BF16, 33, (1, 2, 3), 0),
        (BF16, 13, (2, 1), 3),
        (F32, 17, (3,), 16),
    ],
    ids=str,
)
def test_every_bit_comes_back_and_products_are_right(number_format, columns, widths, dropped_bits):
    weights = make_rows("gaussian", number_format, (3, columns), dropped_bits=dropped_bits)
    weights[0, 1] |= number_format.storage.type(1)  # it escapes where bits are dropped
    layout = layout_of(weights, number_format, widths, 2, dropped_bits)
    held = held_there(weights, layout)
    assert torch.equal(unpacked(held), tensor_of_patterns(weights))
    x, bias = inputs_for(held, tokens=1)
    assert_close(product(held, x, bias), to_floats(weights, number_format), x, bias)


@interpreter
def test_weights_that_are_not_finite_come_back():
    weights = make_rows("any finite bits", BF16, (1, 12))
    weights[0, :3] = 0x7F80, 0xFFC1, 0x8000
    held = held_there(weights, layout_of(weights, BF16, (2, 1), 1))
    assert torch.equal(unpacked(held), tensor_of_patterns(weights))


@interpreter
def test_what_lies_past_the_end_of_a_row_is_not_added():
    # the first exponent of the lists is that of infinity
    layout = WholeLayout(
        number_format=BF16, weights=9, widths=(2,), exponents=((0xFF, 0x7E, 0x7F),) * 4
    )
    held = held_there(np.full((1, 9), 0x3F00, np.uint16), layout)
    x = torch.ones(1, 9, dtype=torch.bfloat16, device=held.records.device)
    assert product(held, x).tolist() == [[4.5]]


@interpreter
def test_programs_that_share_a_row_and_several_tokens(monkeypatch):
    monkeypatch.setattr("emp_kernels.gpu.multiply.PART", 256)
    monkeypatch.setattr("emp_kernels.gpu.whole.PART", 256)
    weights = make_rows("heavy tailed", BF16, (2, 300))
    held = held_there(weights, layout_of(weights, BF16, (2, 1), 2))
    assert held.there.ranks.shape == (2, 2, 2)
    x, bias = inputs_for(held, tokens=3)
    found = product(replace(held, processors=100), x, bias)
    assert_close(found, to_floats(weights, BF16), x, bias)


@interpreter
def test_parts_of_rows_and_rows_that_are_asked_for():
    weights = make_rows("gaussian", F16, (4, 12))
    held = held_there(weights, layout_of(weights, F16, (2, 1), 2)).part(1, 3)
    kept = tensor_of_patterns(weights)[1:3]
    assert torch.equal(unpacked(held), kept)
    x, bias = inputs_for(held, tokens=1)
    assert_close(product(held, x, bias), to_floats(weights, F16)[1:3], x, bias)
    rows = torch.tensor([1, 2, -1], device=held.records.device)
    out = torch.zeros(3, 12, dtype=torch.float16, device=rows.device)
    gather_whole_there(held, rows, out)
    assert torch.equal(patterns(out)[:1], kept[1:])
    assert out[1:].isnan().all()


def refusal(plane, lengths, layout, shape):
    with pytest.raises(DamagedRowError) as caught:
        hold_whole_there(plane.to(find_devices()[0]), np.array(lengths), layout, *shape)
    return caught.value


@interpreter
def test_damaged_records_are_refused_before_the_first_product():
    # two records of six bytes: five values, and a tier of one bit a weight, whose codes are all 0
    weights = np.array([[0x3F00] * 5, [0xBF40] * 5], np.uint16)
    layout = WholeLayout(
        number_format=BF16, weights=5, widths=(1, 1), exponents=((0x7E, 0x7F),) * 4
    )
    plane, lengths = packed(weights, layout)
    assert lengths.tolist() == [6, 6]
    for change, fault in [
        (0x20, "a stripe has bits past its last weight"),
        (0x01, "it is longer or shorter than its codes say"),
    ]:
        damaged = plane.clone()
        damaged[11] ^= change
        found = refusal(damaged, lengths, layout, (2, 5))
        assert (found.row, found.fault) == (1, fault)
    needless = torch.tensor([*[0x00] * 5, 0x01, 0x01, 0x7E], dtype=torch.uint8)
    found = refusal(needless, [8], layout, (1, 5))
    assert (found.row, found.fault) == (0, "it has an escape where none is needed")
    found = refusal(plane[:12], [6, 5], layout, (2, 5))
    assert (found.row, found.fault) == (1, "it is longer or shorter than its codes say")
    found = refusal(plane, [100, 6], layout, (2, 5))
    assert (found.row, found.fault) == (0, "its length, 100 bytes, is impossible")
    found = refusal(torch.zeros(30, dtype=torch.uint8), lengths, layout, (2, 5))
    assert found.fault == "the row table says 12 bytes of records, there are 30"
    with pytest.raises(ValueError, match="2 records of 5 weights do not hold 2 rows of 4"):
        hold_whole_there(plane, lengths, layout, 2, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("number_format", [BF16, F16, F32], ids=lambda f: f.name)
@pytest.mark.parametrize("shape", [(4096, 4096), (300, 2048), (5000, 575)], ids=str)
def test_products_on_a_device_and_from_a_cuda_graph(shape, number_format):
    weights = make_rows("gaussian", number_format, shape)
    widths = (2, 1, 1, 1, 1, 1)
    held = held_there(weights, layout_of(weights, number_format, widths, -(-16384 // shape[1])))
    assert torch.equal(unpacked(held), tensor_of_patterns(weights))
    x, bias = inputs_for(held, tokens=4)
    out = product(held, x, bias)
    assert_close(out, to_floats(weights, number_format), x, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        multiply_whole_there(held, x, out, bias)
    x.mul_(2)
    out.fill_(torch.nan)
    graph.replay()
    assert_close(out, to_floats(weights, number_format), x, bias)
