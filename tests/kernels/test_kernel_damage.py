"""Damaged records are refused, whatever is wrong with them, and nothing past them is touched."""

import re

import numpy as np
import pytest
from emp_kernels.checks import check_table
from emp_kernels.dispatch import pack_rows, unpack_rows
from emp_kernels.errors import DamagedRowError
from emp_kernels.held_dispatch import hold_rows, unpack_held_rows
from emp_kernels.layout import RADICES, RowLayout
from emp_kernels.numbers import BF16, F16, F32
from emp_kernels.rows import PerRow
from hypothesis import given, settings
from hypothesis import strategies as st
from support import format_reader
from support.rows import NUMBER_FORMATS, GuardedWorkspace, guarded, make_rows

impls = pytest.mark.parametrize(
    "impl",
    ["reference", "scalar", "simd", pytest.param("triton", marks=pytest.mark.interpreter)],
)
formats = pytest.mark.parametrize("number_format", NUMBER_FORMATS, ids=lambda f: f.name)


def refusal(payload, table, layout, impl):
    with pytest.raises(DamagedRowError) as caught:
        unpack_rows(payload, np.array(table, np.int64), layout, impl=impl)
    if impl != "triton":
        with pytest.raises(DamagedRowError, match=re.escape(str(caught.value))):
            hold_rows(payload, np.array(table, np.int64), layout, impl=impl)
    assert str(caught.value) == f"row {caught.value.row}: {caught.value.fault}"
    return caught.value


def packed_block(number_format, columns=45, **options):
    layout = RowLayout(number_format=number_format, columns=columns, **options)
    weights = make_rows("gaussian", number_format, (3, columns))
    packed = pack_rows(weights, layout, PerRow(1.0), impl="reference")
    assert not packed.table[:, 1].any()
    starts = layout.offsets(packed.table[:, 0], packed.table[:, 1])
    return packed.payload.copy(), packed.table, layout, starts


@impls
@formats
@pytest.mark.parametrize("bit", [0, 17, 44])
def test_a_mask_with_one_bit_more_or_less_is_refused(number_format, bit, impl):
    payload, table, layout, starts = packed_block(number_format, radix=16)
    payload[starts[1] + bit // 8] ^= 1 << bit % 8
    error = refusal(payload, table, layout, impl)
    assert error.row == 1
    assert error.fault == "its mask names another number of weights than its table line"


@impls
@formats
@pytest.mark.parametrize("bit", [45, 46, 47])
def test_a_mask_that_names_columns_past_the_last_is_refused(number_format, bit, impl):
    payload, table, layout, starts = packed_block(number_format, radix=16)
    mask = payload[starts[2] : starts[2] + 6]
    kept = int(np.flatnonzero(np.unpackbits(mask, bitorder="little"))[0])
    mask[kept // 8] ^= 1 << kept % 8  # so many bits as before
    mask[bit // 8] ^= 1 << bit % 8
    assert refusal(payload, table, layout, impl).row == 2


@impls
def test_an_escape_mark_that_the_table_does_not_count_is_refused(impl):
    # radix 1: a value is sign and distance, all distances but 127 are in the window
    layout = RowLayout(number_format=BF16, columns=4, radix=1)
    payload = np.array([0, 0x85, 0x7F, 1], np.uint8)
    error = refusal(payload, [[4, 0, 0x3F00]], layout, impl)
    assert (error.row, "another number of escapes" in error.fault) == (0, True)


@impls
def test_escapes_that_no_value_marks_are_refused(impl):
    layout = RowLayout(number_format=BF16, columns=4, radix=1)
    payload = np.array([0, 0x85, 0x7F, 1, 0x80, 0x3F, 0x80, 0x3F], np.uint8)
    whole = unpack_rows(payload[:6], np.array([[4, 1, 0x3F00]]), layout, impl=impl)
    assert whole.tolist() == [[0x3F00, 0xBF05, 0x3F80, 0x3F01]]
    error = refusal(payload, [[4, 2, 0x3F00]], layout, impl)
    assert (error.row, "another number of escapes" in error.fault) == (0, True)


IMPOSSIBLE = {
    "more kept than columns": [10, 0, 0],
    "kept below zero": [-1, 0, 0],
    "more escapes than kept": [3, 4, 0],
    "escapes below zero": [3, -1, 0],
    "base below zero": [3, 0, -1],
    "base past the keys": [3, 0, 0x8000],
    "kept of 2**62": [2**62, 0, 0],
}


@impls
@pytest.mark.parametrize("line", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_an_impossible_table_line_is_refused_and_shown(line, impl):
    layout = RowLayout(number_format=F16, columns=9)
    error = refusal(np.zeros(100, np.uint8), [[0, 0, 0], line], layout, impl)
    assert error.row == 1
    assert f"(kept, escaped, base) = {tuple(line)} is impossible" in error.fault


def test_the_largest_possible_table_line_is_accepted():
    layout = RowLayout(number_format=F16, columns=9)
    check_table(np.array([[9, 9, 0x7FFF], [0, 0, 0]]), layout)


@impls
@formats
@pytest.mark.parametrize("change", [-1, 1])
def test_a_payload_of_another_length_than_the_table_says_is_refused(number_format, change, impl):
    payload, table, layout, _ = packed_block(number_format)
    other = np.concatenate([payload, np.zeros(1, np.uint8)])[: payload.size + change].copy()
    error = refusal(other, table, layout, impl)
    said = f"the row table says {payload.size} bytes of records"
    assert error.fault == f"{said}, there are {other.size}"


@impls
@pytest.mark.parametrize(("number_format", "size"), [(BF16, 1), (F16, 2), (F32, 3)])
def test_a_window_that_reaches_infinity_is_refused_where_a_weight_lies_there(
    number_format, size, impl
):
    # one weight of distance 0: sign and stored bits are 1 + 7, 1 + 10 and 1 + 23 bits, all zero
    layout = RowLayout(number_format=number_format, columns=1, radix=2)
    payload = np.zeros(size + 1, np.uint8)
    largest = number_format.infinity - 1
    assert unpack_rows(payload, np.array([[1, 0, largest]]), layout, impl=impl) == [[largest]]
    for base in (largest + 1, number_format.key_mask):
        error = refusal(payload, [[1, 0, base]], layout, impl)
        assert (error.row, error.fault) == (0, "it holds NaN or infinity")


@impls
@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0, 0xFFFF])
def test_an_escape_that_is_nan_or_infinity_is_refused(bits, impl):
    layout = RowLayout(number_format=BF16, columns=1, radix=1)
    payload = np.array([0x7F, bits & 0xFF, bits >> 8], np.uint8)
    assert refusal(payload, [[1, 1, 0]], layout, impl).fault == "it holds NaN or infinity"


@impls
@pytest.mark.parametrize(("dropped_bits", "base", "value"), [(0, 0x7FFF, 1), (7, 0x100, 0)])
def test_a_key_past_the_last_one_is_refused(dropped_bits, base, value, impl):
    # (base + distance) << dropped is 0x8000 both times, which is no key but the sign of −0.0
    layout = RowLayout(number_format=BF16, columns=1, radix=2, dropped_bits=dropped_bits)
    refusal(np.array([value, 0], np.uint8), [[1, 0, base]], layout, impl)


@st.composite
def random_blocks(draw):
    """A layout, a table and as many random bytes as it says."""
    number_format = draw(st.sampled_from(NUMBER_FORMATS))
    layout = RowLayout(
        number_format=number_format,
        columns=draw(st.sampled_from([1, 3, 8, 13, 16, 31, 32, 33, 64, 70])),
        dropped_bits=draw(st.sampled_from([0, 1, 4, number_format.mantissa_bits])),
        radix=draw(st.sampled_from(RADICES)),
        align=draw(st.sampled_from([1, 16])),
    )
    last_base = number_format.key_mask >> layout.dropped_bits
    full_window = max(last_base - layout.limit, 0)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    lines, records = [], []
    for _ in range(draw(st.integers(1, 3))):
        keep = rng.random(layout.columns) < draw(st.sampled_from([0.0, 0.5, 1.0]))
        kept = int(keep.sum())
        escaped = min(kept, draw(st.sampled_from([0, 0, 0, 1, 2, kept])))
        base = draw(
            st.sampled_from([int(rng.integers(0, full_window + 1)), full_window, last_base])
        )
        lines.append([kept, escaped, base])
        lengths = layout.sections(np.array([kept]), np.array([escaped]))[0]
        record = rng.integers(0, 256, lengths.sum(), np.uint8)
        if lengths[0] and draw(st.integers(0, 3)):
            mask = np.packbits(keep, bitorder="little")
            record[: mask.size] = mask
        records.append(record)
    return layout, np.array(lines, np.int64), np.concatenate(records)


def decode(layout, table, payload, impl, surroundings):
    """The weights' bytes, or the row and fault; `surroundings` is the byte all around.

    To read past the end of the payload would end the process.
    """
    room = guarded(256 + payload.size)
    room[:256], room[256:] = surroundings, payload
    size = len(table) * layout.columns
    item = layout.number_format.item_bytes
    memory = np.full(size * item + 512, surroundings, np.uint8)
    out = memory[256:-256].view(layout.number_format.storage).reshape(len(table), layout.columns)
    workspace = GuardedWorkspace(surroundings)
    try:
        unpack_rows(room[256:], table, layout, out=out, impl=impl, workspace=workspace)
        result = out.copy()
    except DamagedRowError as error:
        result = error.row, error.fault
    assert (memory[:256] == surroundings).all()
    assert (memory[-256:] == surroundings).all()
    return result


def decode_held(layout, table, payload, surroundings):
    """The same from rows that are held."""
    room = guarded(256 + payload.size)
    room[:256], room[256:] = surroundings, payload
    workspace = GuardedWorkspace(surroundings)
    out = np.empty((len(table), layout.columns), layout.number_format.storage)
    try:
        held = hold_rows(room[256:], table, layout, workspace=workspace)
    except DamagedRowError as error:
        return error.row, error.fault
    unpack_held_rows(held, 0, len(table), out)
    return out


@settings(max_examples=500, deadline=None)
@given(random_blocks())
def test_random_bytes_decode_as_specified_or_are_refused_whatever_lies_around_them(block):
    layout, table, payload = block
    outcomes = [
        decode(layout, table, payload, impl, surroundings)
        for impl in ("scalar", "simd")
        for surroundings in (0, 0xFF)
    ]
    outcomes += [decode_held(layout, table, payload, surroundings) for surroundings in (0, 0xFF)]
    for outcome in outcomes[1:]:
        assert type(outcome) is type(outcomes[0])
        np.testing.assert_array_equal(outcome, outcomes[0])
    parameters = format_reader.Parameters(
        layout.number_format.code, layout.dropped_bits, layout.radix, layout.align, layout.columns
    )
    try:
        expected, _ = format_reader.read_rows(payload.tobytes(), table.tolist(), parameters)
    except format_reader.DamagedError:
        assert isinstance(outcomes[0], tuple)
    else:
        np.testing.assert_array_equal(outcomes[0], expected)
