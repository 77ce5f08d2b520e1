"""Packed rows on a device are multiplied, unpacked and looked up from where they lie."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from emp_kernels.errors import DamagedRowError
from emp_kernels.gpu_arguments import MOST_TOKENS
from emp_kernels.gpu_devices import find_devices
from emp_kernels.gpu_held import (
    gather_rows_there,
    hold_rows_there,
    multiply_rows_there,
    unpack_rows_there,
)
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import BF16, F16, F32, tensor_of_patterns, torch_integers
from emp_kernels.reference import pack_row
from support.rows import NUMBER_FORMATS, guarded, make_rows, to_floats, zeros_elsewhere

interpreter = pytest.mark.interpreter
formats = pytest.mark.parametrize("number_format", NUMBER_FORMATS, ids=lambda f: f.name)


def kept_at_random(shape, share=0.64):
    return np.random.default_rng([*shape]).random(shape) < share


def packed(weights, keep, layout):
    """The table and the plane of records, at the end of memory that nothing may be read past."""
    lines, records = [], []
    for row, kept in zip(weights, keep, strict=True):
        *line, record = pack_row(row, kept, layout)
        lines.append(line)
        records.append(record)
    payload = b"".join(records)
    plane = guarded(-(-len(payload) // 16) * 16)
    plane[:] = 0
    plane[: len(payload)] = np.frombuffer(payload, np.uint8)
    return np.array(lines, np.int64), torch.from_numpy(plane)


def held_there(weights, keep, layout):
    table, plane = packed(weights, keep, layout)
    device = find_devices()[0]
    return hold_rows_there(plane if device.type == "cpu" else plane.to(device), table, layout)


def inputs_for(held, tokens, seed=0):
    """Inputs and biases of the weights' dtype."""
    torch.manual_seed(seed)
    dtype, device = held.layout.number_format.torch_dtype, held.records.device
    x = torch.randn(tokens, held.layout.columns).to(device, dtype)
    return x, torch.randn(held.rows).to(device, dtype)


def product(held, x, bias=None):
    out = torch.full((len(x), held.rows), torch.nan, dtype=x.dtype, device=x.device)
    multiply_rows_there(held, x, out, bias)
    return out


def assert_close(found, weights, x, bias=None):
    """Within the rounding of a sum in float32 and of its result."""
    dense = torch.from_numpy(weights)
    wide, added = x.cpu().double(), 0.0 if bias is None else bias.cpu().double()
    expected = wide @ dense.T + added
    terms = wide.abs() @ dense.abs().T + (0.0 if bias is None else added.abs())
    finfo = torch.finfo(found.dtype)
    bound = (finfo.eps / 2) * expected.abs() + 40 * 2**-24 * terms + finfo.smallest_normal
    assert ((found.cpu().double() - expected).abs() <= bound).all()


def check_product(weights, keep, layout, tokens, *, with_bias=False):
    held = held_there(weights, keep, layout)
    x, bias = inputs_for(held, tokens)
    kept = to_floats(zeros_elsewhere(weights, keep), layout.number_format)
    found = product(held, x, bias if with_bias else None)
    assert_close(found, kept, x, bias if with_bias else None)


@interpreter
@pytest.mark.parametrize(
    ("columns", "number_format"),
    [(1, F16), (15, BF16), (33, F32), (258, BF16)],
    ids=lambda value: getattr(value, "name", value),
)
def test_products_of_rows_below_and_past_a_tile(columns, number_format):
    layout = RowLayout(number_format=number_format, columns=columns)
    weights = make_rows("gaussian", number_format, (1, columns))
    check_product(weights, kept_at_random(weights.shape), layout, tokens=2)


@interpreter
@pytest.mark.parametrize(
    ("tokens", "number_format"),
    [(3, BF16), (16, BF16), (3, F16), (16, F32)],
    ids=lambda value: getattr(value, "name", value),
)
def test_products_with_a_few_tokens_and_a_bias(tokens, number_format):
    layout = RowLayout(number_format=number_format, columns=48, align=16)
    weights = make_rows("gaussian", number_format, (1, 48))
    check_product(weights, kept_at_random(weights.shape), layout, tokens, with_bias=True)


@interpreter
@pytest.mark.parametrize(
    ("number_format", "options"),
    [
        (BF16, {"radix": 1, "align": 2}),
        (BF16, {"radix": 6, "align": 32}),
        (BF16, {"radix": 16, "dropped_bits": 3}),
        (F16, {"radix": 4, "dropped_bits": 3}),
        (F16, {"radix": 3, "align": 64}),
        (F32, {"radix": 3, "dropped_bits": 16}),
    ],
    ids=str,
)
def test_products_in_every_kind_of_layout(number_format, options):
    layout = RowLayout(number_format=number_format, columns=56, **options)
    weights = make_rows(
        "gaussian", number_format, (1, 56), dropped_bits=options.get("dropped_bits", 0)
    )
    check_product(weights, kept_at_random(weights.shape, 0.75), layout, tokens=1)


@interpreter
@formats
def test_products_of_rows_with_many_escapes(number_format):
    layout = RowLayout(number_format=number_format, columns=40, radix=2)
    weights = make_rows("heavy tailed", number_format, (1, 40))
    check_product(weights, kept_at_random(weights.shape), layout, tokens=2)


@interpreter
def test_products_of_rows_of_which_all_or_nothing_stays():
    layout = RowLayout(number_format=BF16, columns=14)
    weights = make_rows("gaussian", BF16, (3, 14))
    check_product(weights, np.repeat([[True], [False], [True]], 14, axis=1), layout, tokens=1)


@interpreter
@pytest.mark.parametrize(("number_format", "rows"), [(BF16, 2), (F32, 1)], ids=["bf16", "fp32"])
def test_programs_that_share_a_row_give_its_product(number_format, rows, monkeypatch):
    # in the second part the next digits of codes begin, and escapes are counted on
    monkeypatch.setattr("emp_kernels.gpu_held.PART", 256)
    monkeypatch.setattr("emp_kernels.gpu.multiply.PART", 256)
    layout = RowLayout(number_format=number_format, columns=300, align=16)
    weights = make_rows("heavy tailed", number_format, (rows, 300))
    keep = kept_at_random(weights.shape, 0.2)
    held = held_there(weights, keep, layout)
    escaped = escapes_before(weights, keep, held, 256)
    assert held.starts.cpu().tolist() == [
        [[0, 0], [row[:256].sum(), count]] for row, count in zip(keep, escaped, strict=True)
    ]
    x, bias = inputs_for(held, tokens=2)
    kept = to_floats(zeros_elsewhere(weights, keep), number_format)
    assert_close(product(replace(held, processors=100), x, bias), kept, x, bias)


def escapes_before(weights, keep, held, column):
    """Escapes of each row before a column, counted weight by weight."""
    number_format, counts = held.layout.number_format, []
    for row, kept, line in zip(weights, keep, held.lines.cpu().tolist(), strict=True):
        keys = (row[:column] & number_format.key_mask).astype(np.int64)
        away = keys[kept[:column]] - line[2]
        counts.append(int(((away < 0) | (away >= held.layout.limit)).sum()))
    return counts


@interpreter
def test_inputs_that_start_within_a_word_of_four_bytes_are_read():
    layout = RowLayout(number_format=BF16, columns=24)
    weights = make_rows("gaussian", BF16, (2, 24))
    keep = kept_at_random(weights.shape)
    held = held_there(weights, keep, layout)
    x = inputs_for(held, tokens=2)[0]
    moved = torch.empty(49, dtype=x.dtype, device=x.device)[1:].view(2, 24).copy_(x)
    assert moved.data_ptr() % 4 == 2
    assert_close(product(held, moved), to_floats(zeros_elsewhere(weights, keep), BF16), x)


@interpreter
def test_a_part_of_the_rows_is_unpacked_and_multiplied_by_itself():
    layout = RowLayout(number_format=BF16, columns=20)
    weights = make_rows("gaussian", BF16, (4, 20))
    keep = kept_at_random(weights.shape)
    held = held_there(weights, keep, layout).part(1, 3)
    x = inputs_for(held, tokens=1)[0]
    out = torch.full((2, 20), torch.nan, dtype=x.dtype, device=x.device)
    unpack_rows_there(held, out)
    kept = zeros_elsewhere(weights, keep)[1:3]
    found = out.cpu().view(torch_integers(out.itemsize))
    assert torch.equal(found, tensor_of_patterns(kept))
    assert held.records.data_ptr() == held.part(0, 1).records.data_ptr()
    assert_close(product(held, x), to_floats(kept, BF16), x)


@interpreter
@pytest.mark.parametrize("number_format", [BF16, F32], ids=lambda f: f.name)
def test_rows_are_looked_up_in_any_order_and_those_that_are_not_there_are_nan(number_format):
    layout = RowLayout(number_format=number_format, columns=14)
    weights = make_rows("gaussian", number_format, (3, 14))
    keep = kept_at_random(weights.shape)
    held = held_there(weights, keep, layout)
    rows = torch.tensor([2, 0, 3, -1], device=held.records.device)
    out = torch.zeros(4, 14, dtype=number_format.torch_dtype, device=rows.device)
    gather_rows_there(held, rows, out)
    found = out.cpu()
    expected = tensor_of_patterns(zeros_elsewhere(weights, keep)[[2, 0]])
    assert torch.equal(found[:2].view(torch_integers(found.itemsize)), expected)
    assert found[2:].isnan().all()


@interpreter
def test_damaged_rows_are_refused_before_the_first_product():
    layout = RowLayout(number_format=BF16, columns=45, radix=16)
    weights = make_rows("gaussian", BF16, (3, 45))
    table, plane = packed(weights, kept_at_random(weights.shape), layout)
    start = int(layout.offsets(table[:, 0], table[:, 1])[1])
    plane[start] ^= 1
    with pytest.raises(DamagedRowError, match="row 1: its mask names another number") as caught:
        hold_rows_there(plane.to(find_devices()[0]), table, layout)
    assert caught.value.row == 1


@interpreter
@pytest.mark.parametrize("change", [-1, 16])
def test_records_of_another_length_than_the_table_says_are_refused(change):
    layout = RowLayout(number_format=BF16, columns=16)
    said = int(layout.sections(np.array([16, 16]), np.array([0, 0])).sum())
    records = torch.zeros(said + change, dtype=torch.uint8, device=find_devices()[0])
    table = np.array([[16, 0, 0], [16, 0, 0]])
    with pytest.raises(DamagedRowError, match=f"says {said} bytes of records, there are"):
        hold_rows_there(records, table, layout)


@interpreter
def test_records_that_are_no_whole_words_are_copied_and_others_are_not():
    layout = RowLayout(number_format=BF16, columns=16)
    weights = make_rows("all equal", BF16, (1, 16))
    table, plane = packed(weights, np.ones((1, 16), bool), layout)
    there = plane.to(find_devices()[0])
    assert hold_rows_there(there, table, layout).records.data_ptr() == there.data_ptr()
    held = hold_rows_there(there[:21], table, layout)
    assert table.tolist()[0][:2] == [16, 0]  # no mask, values 16, codes 4: 20 bytes
    assert held.records.numel() == 24


@interpreter
def test_what_does_not_fit_is_refused():
    layout = RowLayout(number_format=BF16, columns=16)
    weights = make_rows("gaussian", BF16, (2, 16))
    held = held_there(weights, kept_at_random(weights.shape), layout)
    x = inputs_for(held, tokens=1)[0]
    with pytest.raises(ValueError, match=r"must be torch.bfloat16 \(1, 16\), contiguous"):
        product(held, x[:, :8])
    with pytest.raises(ValueError, match=r"x is torch.float32 \(1, 16\)"):
        product(held, x.float())
    with pytest.raises(ValueError, match=f"17 tokens; it must have 1 to {MOST_TOKENS}"):
        product(held, x.repeat(17, 1))
    with pytest.raises(ValueError, match=r"must be torch.bfloat16 \(2, 16\)"):
        unpack_rows_there(held, torch.zeros(3, 16, dtype=torch.bfloat16))


@pytest.mark.gpu
@formats
@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 11008), (256, 2048), (300, 4095)], ids=str)
@pytest.mark.parametrize("tokens", [1, 4, 16])
def test_products_on_a_device_and_from_a_cuda_graph(shape, tokens, number_format):
    layout = RowLayout(number_format=number_format, columns=shape[1], align=16)
    weights = make_rows("gaussian", number_format, shape)
    keep = np.abs(to_floats(weights, number_format)) > 0.01
    held = held_there(weights, keep, layout)
    kept = to_floats(zeros_elsewhere(weights, keep), number_format)
    x, bias = inputs_for(held, tokens)
    out = product(held, x, bias)
    assert_close(out, kept, x, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        multiply_rows_there(held, x, out, bias)
    x.copy_(inputs_for(held, tokens, seed=1)[0])
    out.fill_(torch.nan)
    graph.replay()
    assert_close(out, kept, x, bias)
