"""The kernel for GPUs gives back every bit of what was packed, at and past the tiles it works in.

Damaged records: tests/test_kernel_damage.py.
"""

import numpy as np
import pytest
import torch
from emp_kernels.dispatch import pack_rows, unpack_rows
from emp_kernels.errors import DamagedRowError
from emp_kernels.gpu.unpack import unpack, upload_records
from emp_kernels.gpu_devices import find_devices
from emp_kernels.gpu_workspace import DeviceWorkspace
from emp_kernels.layout import RADICES, RowLayout
from emp_kernels.numbers import BF16, F16, F32, torch_integers
from emp_kernels.reference import pack_row
from emp_kernels.rows import PerRow
from support.rows import KINDS, NUMBER_FORMATS, make_rows, zeros_elsewhere

interpreter = pytest.mark.interpreter
formats = pytest.mark.parametrize("number_format", NUMBER_FORMATS, ids=lambda f: f.name)


def packed(weights, keep, layout):
    """The table and the records of rows."""
    lines, records = [], [b""]
    for row, kept in zip(weights, keep, strict=True):
        *line, record = pack_row(row, kept, layout)
        lines.append(line)
        records.append(record)
    payload = np.frombuffer(b"".join(records), np.uint8)
    return np.array(lines, np.int64).reshape(-1, 3), payload


def poisoned(shape, layout, device):
    dtype = torch_integers(layout.number_format.item_bytes)
    return torch.full(shape, 0x5555, dtype=dtype, device=device)


def sections_of(table, layout):
    return layout.sections(table[:, 0], table[:, 1])


def unpack_there(payload, table, layout, out, workspace, tile):
    records, sections = upload_records(payload, workspace), sections_of(table, layout)
    unpack(records, sections, table, layout, out, workspace, tile=tile)


def as_patterns(out, layout):
    return out.cpu().numpy().view(layout.number_format.storage)


def check(weights, keep, layout, tile):
    """Pack by the reference, unpack by the kernel, and compare with the weights that were kept."""
    table, payload = packed(weights, keep, layout)
    workspace = DeviceWorkspace(find_devices()[0])
    out = poisoned(weights.shape, layout, workspace.device)
    with workspace.active():
        unpack_there(payload, table, layout, out, workspace, tile)
    expected = zeros_elsewhere(weights, keep)
    np.testing.assert_array_equal(as_patterns(out, layout), expected)


def kept_at_random(shape, share):
    return np.random.default_rng([*shape]).random(shape) < share


@interpreter
@formats
@pytest.mark.parametrize("columns", [1, 15, 16, 33])
def test_rows_below_at_and_past_a_tile_come_back(columns, number_format):
    layout = RowLayout(number_format=number_format, columns=columns)
    weights = make_rows("heavy tailed", number_format, (2, columns))
    check(weights, kept_at_random(weights.shape, 0.7), layout, tile=16)


@interpreter
@pytest.mark.parametrize(
    ("kind", "number_format"),
    [(kind, f) for n, kind in enumerate(KINDS) for f in (BF16, (F16, F32)[n % 2])],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_kind_of_row_comes_back(kind, number_format):
    layout = RowLayout(number_format=number_format, columns=61, align=16)
    weights = make_rows(kind, number_format, (1, 61))
    check(weights, kept_at_random(weights.shape, 0.6), layout, tile=64)


@interpreter
@pytest.mark.parametrize("number_format", [BF16, F32], ids=lambda f: f.name)
@pytest.mark.parametrize("radix", RADICES)
def test_every_radix_and_alignment_comes_back(radix, number_format):
    # 90 weights of 120 stay: digits begin anew within tiles, and where a byte has many, in chunks
    align = {1: 1, 2: 2, 3: 4, 4: 8, 6: 32, 16: 64}[radix]
    layout = RowLayout(number_format=number_format, columns=120, radix=radix, align=align)
    weights = make_rows("gaussian", number_format, (1, 120))
    check(weights, kept_at_random(weights.shape, 0.75), layout, tile=64)


@interpreter
@pytest.mark.parametrize(
    ("number_format", "dropped_bits", "radix"),
    [
        (BF16, 3, 3),
        (BF16, 7, 1),
        (F16, 3, 3),
        (F16, 3, 16),
        (F16, 10, 16),
        (F32, 5, 1),
        (F32, 16, 3),
        (F32, 23, 16),
    ],
)
def test_every_width_of_values_comes_back(number_format, dropped_bits, radix):
    layout = RowLayout(
        number_format=number_format, columns=40, radix=radix, dropped_bits=dropped_bits
    )
    weights = make_rows("gaussian", number_format, (1, 40), dropped_bits=dropped_bits)
    check(weights, kept_at_random(weights.shape, 0.7), layout, tile=64)


@interpreter
@formats
def test_rows_of_which_all_or_nothing_stays_come_back(number_format):
    layout = RowLayout(number_format=number_format, columns=21, radix=2)
    weights = make_rows("gaussian", number_format, (3, 21))
    check(weights, np.repeat([[True], [False], [True]], 21, axis=1), layout, tile=16)


@interpreter
@formats
def test_rows_whose_weights_all_escape_come_back(number_format):
    layout = RowLayout(
        number_format=number_format,
        columns=40,
        radix=1,
        dropped_bits=number_format.mantissa_bits,
    )
    weights = make_rows("gaussian", number_format, (2, 40)) | number_format.storage.type(1)
    keep = kept_at_random(weights.shape, 0.9)
    table, _ = packed(weights, keep, layout)
    assert (table[:, 1] == table[:, 0]).all()
    check(weights, keep, layout, tile=32)


@interpreter
def test_no_rows_are_no_work():
    layout = RowLayout(number_format=BF16, columns=8)
    nothing = np.empty(0, np.uint8)
    rows = unpack_rows(nothing, np.empty((0, 3), np.int64), layout, impl="triton")
    assert rows.shape == (0, 8)


@interpreter
def test_rows_are_written_to_the_columns_of_a_matrix_and_nothing_else_is():
    layout = RowLayout(number_format=BF16, columns=20)
    weights = make_rows("gaussian", BF16, (3, 20))
    keep = kept_at_random(weights.shape, 0.6)
    table, payload = packed(weights, keep, layout)
    workspace = DeviceWorkspace(find_devices()[0])
    matrix = poisoned((20, 5), layout, workspace.device)
    with workspace.active():
        unpack_there(payload, table, layout, matrix[:, 1:4].T, workspace, 16)
    patterns = as_patterns(matrix, layout)
    np.testing.assert_array_equal(patterns[:, 1:4].T, zeros_elsewhere(weights, keep))
    assert (patterns[:, [0, 4]] == 0x5555).all()


@interpreter
@pytest.mark.parametrize("columns", [20, 21])
def test_rows_are_written_within_longer_ones_and_nothing_else_is(columns):
    layout = RowLayout(number_format=BF16, columns=columns)
    weights = make_rows("gaussian", BF16, (2, columns))
    keep = kept_at_random(weights.shape, 0.6)
    table, payload = packed(weights, keep, layout)
    workspace = DeviceWorkspace(find_devices()[0])
    for first in (1, 2):  # in the middle of a word of four bytes, and at the start of one
        matrix = poisoned((2, 30), layout, workspace.device)
        there = matrix[:, first : first + columns]
        with workspace.active():
            unpack_there(payload, table, layout, there, workspace, 16)
        patterns = as_patterns(matrix, layout)
        found = patterns[:, first : first + columns]
        np.testing.assert_array_equal(found, zeros_elsewhere(weights, keep))
        assert (np.delete(patterns, np.s_[first : first + columns], axis=1) == 0x5555).all()


@interpreter
def test_the_backend_gives_what_was_packed_in_place_or_anew():
    layout = RowLayout(number_format=F16, columns=33)
    weights = make_rows("gaussian", F16, (2, 33))
    block = pack_rows(weights, layout, PerRow(1.0), impl="reference")
    expected = unpack_rows(block.payload, block.table, layout, impl="reference")
    out = np.full((2, 33), 0x5555, np.uint16)
    anew = unpack_rows(block.payload, block.table, layout, impl="triton")
    assert unpack_rows(block.payload, block.table, layout, out=out, impl="triton") is out
    np.testing.assert_array_equal(anew, expected)
    np.testing.assert_array_equal(out, expected)


@interpreter
def test_the_first_of_several_damaged_rows_is_named_with_its_first_fault():
    layout = RowLayout(number_format=BF16, columns=9, radix=1)
    weights = make_rows("all equal", BF16, (4, 9))
    keep = kept_at_random(weights.shape, 0.6)
    table, payload = packed(weights, keep, layout)
    starts = layout.offsets(table[:, 0], table[:, 1])
    damaged = payload.copy()
    damaged[starts[1] + 1] |= 0x80  # a column past the last
    damaged[starts[1] + 2] |= 0x7F  # the mark of an escape: found before the mask is looked at
    damaged[starts[2]] ^= 1
    with pytest.raises(DamagedRowError) as caught:
        unpack_rows(damaged, table, layout, impl="triton")
    assert caught.value.row == 1
    assert caught.value.fault == "it marks another number of escapes than its table line"


@interpreter
def test_a_payload_shorter_than_the_table_says_is_not_read():
    layout = RowLayout(number_format=BF16, columns=64)
    workspace = DeviceWorkspace(find_devices()[0])
    out = poisoned((1, 64), layout, workspace.device)
    with workspace.active():
        short = upload_records(np.zeros(76, np.uint8), workspace)
        table = np.array([[64, 0, 0]])
        sections = sections_of(table, layout)
        with pytest.raises(ValueError, match="has 108 bytes, it must have 77 of records and 32"):
            unpack(short, sections, table, layout, out, workspace)


@pytest.mark.gpu
@formats
@pytest.mark.parametrize(
    "columns",
    [4096, 11008, 8192, 28672, 14336, 65536, 4095],
    ids=["7B", "7B down", "70B", "70B down", "Mixtral down", "longest", "odd"],
)
@pytest.mark.parametrize("kind", ["gaussian", "heavy tailed", "any finite bits"])
def test_rows_of_large_models_come_back_on_a_device(columns, number_format, kind):
    weights = make_rows(kind, number_format, (300, columns))
    for radix in (3, 16):
        layout = RowLayout(number_format=number_format, columns=columns, radix=radix, align=16)
        block = pack_rows(weights, layout, PerRow(1.0), impl="scalar")
        expected = unpack_rows(block.payload, block.table, layout, impl="scalar")
        found = unpack_rows(block.payload, block.table, layout, impl="triton")
        np.testing.assert_array_equal(found, expected)
