"""Whole records: every backend writes the same bytes, gives every bit back, refuses damage alike.

The worked example is that of FORMAT.md: ten bfloat16 weights, tiers of 1 and 2 bits, four lists.
"""

import numpy as np
import pytest
from emp_kernels.dispatch import pack_whole, unpack_whole
from emp_kernels.errors import DamagedRowError
from emp_kernels.numbers import BF16, F16, F32
from emp_kernels.whole_layout import WholeLayout
from hypothesis import given, settings
from hypothesis import strategies as st
from support import format_reader
from support.rows import NUMBER_FORMATS, GuardedWorkspace, guarded, lists_of, make_rows
from support.whole_tensors import SPECIAL, tensors

IMPLS = ("reference", "scalar", "simd")

impls = pytest.mark.parametrize("impl", IMPLS)

LENGTH = "it is longer or shorter than its codes say"
STRIPE = "a stripe has bits past its last weight"
ESCAPE = "it has an escape where none is needed"

EXAMPLE = WholeLayout(
    number_format=BF16,
    weights=10,
    widths=(1, 2),
    exponents=(
        (0x7E, 0x7D, 0x7F, 0),
        (0x7D, 0x7E, 0x7F, 0),
        (0x7E, 0x7D, 0, 0x7F),
        (0x7D, 0x7E, 0, 0x7F),
    ),
)
WEIGHTS = np.array(
    [0x3F00, 0xBF40, 0x3F20, 0x3E80, 0xBF80, 0, 0xBF00, 0x3F60, 0xFF80, 0x3EA0], np.uint16
)
RECORD = bytes.fromhex("00C02000800080608020 BC01 24 28 FF")


def decode(record, layout, count, impl, surroundings=0):
    """The weights of one record, or its fault; `surroundings` is the byte all around.

    To read past the end of the record, or to write past the weights, would end the process.
    """
    payload = guarded(len(record))
    payload[:] = np.frombuffer(record, np.uint8)
    out = guarded(count * layout.number_format.item_bytes).view(layout.number_format.storage)
    lengths, workspace = np.array([len(record)], np.int64), GuardedWorkspace(surroundings)
    try:
        unpack_whole(payload, lengths, layout, out, impl=impl, workspace=workspace)
    except DamagedRowError as error:
        return error.fault
    return out.tolist()


def by_specification(record, layout, count):
    """The weights as the specification's reader finds them, or None if it refuses the record."""
    code = format_reader.Code(
        layout.number_format.code,
        layout.dropped_bits,
        layout.weights,
        layout.widths,
        layout.exponents,
    )
    try:
        return format_reader.read_whole_record(record, count, code)
    except format_reader.DamagedError:
        return None


def assert_all_agree(weights, layout):
    """All backends write the same records, of which two readers get every bit back."""
    plain = pack_whole(weights, layout, impl="reference")
    assert (plain.lengths <= layout.longest_record).all()
    for impl in IMPLS:
        packed = pack_whole(weights, layout, impl=impl, workspace=GuardedWorkspace(0xAA))
        measured = pack_whole(
            weights, layout, emit=False, impl=impl, workspace=GuardedWorkspace(0x55)
        )
        assert packed.payload.tobytes() == plain.payload.tobytes()
        assert packed.lengths.tolist() == measured.lengths.tolist() == plain.lengths.tolist()
        assert measured.payload.size == 0
        payload = guarded(packed.payload.size)
        payload[:] = packed.payload
        out = guarded(weights.nbytes).view(weights.dtype).reshape(weights.shape)
        unpack_whole(
            payload, packed.lengths, layout, out, impl=impl, workspace=GuardedWorkspace(0xAA)
        )
        np.testing.assert_array_equal(out, weights)
    return plain


@pytest.mark.parametrize("impl", [*IMPLS, pytest.param("triton", marks=pytest.mark.interpreter)])
def test_the_worked_example_gives_the_bytes_of_the_specification(impl):
    packed = pack_whole(WEIGHTS, EXAMPLE, impl=impl)
    assert packed.payload.tobytes() == RECORD
    assert packed.lengths.tolist() == [15]
    assert decode(RECORD, EXAMPLE, 10, impl) == WEIGHTS.tolist()


@impls
def test_values_past_whole_bytes_are_stripes_and_lost_bits_are_with_the_escape(impl):
    # float16, one bit dropped: a value has 10 bits, a byte and two stripes; exponents 15 and 14
    lists = ((15, 14), (14, 15), (15, 14), (14, 15))
    layout = WholeLayout(
        number_format=F16, weights=3, widths=(1, 1), exponents=lists, dropped_bits=1
    )
    # 1 + 2**-9, with a low bit of 1 that is lost; −0.5 − 2**-2; 2**-24
    weights = np.array([0b0_01111_0000000010 | 1, 0b1_01110_1000000000, 1], np.uint16)
    record = bytes(
        [
            *(0b1, 0, 0),  # low bytes of 0b0_000000001, 0b1_100000000 and 0
            0b010,  # highest bit of the stored nine
            0b010,  # signs
            0b111,  # none has exponent 15 and a last bit of 0
            0b101,  # the second has exponent 14
            *(15 << 1 | 1, 0 << 1 | 1),
        ]
    )
    assert pack_whole(weights, layout, impl=impl).payload.tobytes() == record
    assert decode(record, layout, 3, impl) == weights.tolist()


@impls
def test_a_single_stored_bit_chooses_between_two_lists(impl):
    layout = WholeLayout(
        number_format=BF16,
        weights=3,
        widths=(1, 1),
        exponents=((0x7E, 0x7F), (0x7F, 0x7E)),
        dropped_bits=6,
    )
    weights = np.array([0x3F00, 0xBF40, 0x3FC0], np.uint16)  # exponents 7E, 7E, 7F; bits 0, 1, 1
    # stored bits, signs, tier 1: only the second has a symbol of 1; tier 2 is its
    record = bytes([0b110, 0b010, 0b010, 0])
    assert pack_whole(weights, layout, impl=impl).payload.tobytes() == record
    assert decode(record, layout, 3, impl) == weights.tolist()


@settings(max_examples=150, deadline=None)
@given(tensors())
def test_any_weights_of_any_layout_come_back_from_the_same_bytes_everywhere(tensor):
    layout, weights = tensor
    packed = assert_all_agree(weights, layout)
    payload, at = packed.payload.tobytes(), 0
    for number, length in enumerate(packed.lengths.tolist()):
        here = weights[number * layout.weights : (number + 1) * layout.weights]
        record = payload[at : at + length]
        assert by_specification(record, layout, here.size) == here.tolist()
        at += length


@pytest.mark.parametrize("number_format", NUMBER_FORMATS, ids=lambda f: f.name)
def test_long_records_with_few_escapes_pack_alike_everywhere(number_format):
    weights = make_rows("gaussian", number_format, (3, 40_001), dropped_bits=3)
    weights[0, 5], weights[1, 39_999], weights[2, 40_000] = SPECIAL[number_format][5:8]
    center = 14 if number_format is F16 else 126
    layout = WholeLayout(
        number_format=number_format,
        weights=80_002,
        widths=(2, 2, 3),
        exponents=lists_of(range(center - 12, center + 1), 7),
        dropped_bits=3,
    )
    packed = assert_all_agree(weights, layout)
    assert packed.lengths.size == 2


def test_no_weights_are_no_records():
    for impl in IMPLS:
        packed = pack_whole(WEIGHTS[:0], EXAMPLE, impl=impl)
        assert (packed.lengths.size, packed.payload.size) == (0, 0)
        out = np.empty((0, 5), np.uint16)
        unpack_whole(packed.payload, packed.lengths, EXAMPLE, out, impl=impl)


@impls
@pytest.mark.parametrize("length", [*range(15), 16, 26])
def test_a_record_of_another_length_is_refused(length, impl):
    record = (RECORD + bytes(11))[:length]
    assert decode(record, EXAMPLE, 10, impl) == LENGTH


@impls
@pytest.mark.parametrize(("at", "bit"), [(11, 2), (11, 7), (12, 6), (13, 6), (13, 7)])
def test_a_stripe_with_a_bit_past_its_last_weight_is_refused(at, bit, impl):
    record = bytearray(RECORD)
    record[at] |= 1 << bit
    assert decode(record, EXAMPLE, 10, impl) == STRIPE


@impls
def test_a_stripe_of_values_with_a_bit_past_its_last_weight_is_refused(impl):
    layout = WholeLayout(number_format=F16, weights=3, widths=(1,), exponents=lists_of([15]))
    weights = np.array([0x3C00, 0xBC01, 0x3FFF], np.uint16)
    record = pack_whole(weights, layout, impl="reference").payload.tobytes()
    assert len(record) == 3 + 3 + 1
    assert decode(record, layout, 3, impl) == weights.tolist()
    for at in (3, 4, 5):
        for bit in (3, 7):
            spoiled = bytearray(record)
            spoiled[at] |= 1 << bit
            assert decode(spoiled, layout, 3, impl) == STRIPE


@impls
def test_an_escape_that_has_a_code_is_refused(impl):
    for exponent in range(256):
        found = decode(RECORD[:-1] + bytes([exponent]), EXAMPLE, 10, impl)
        if exponent in EXAMPLE.exponents[0]:
            assert found == ESCAPE
        else:
            assert found[8] == 0x8000 | exponent << 7


@impls
def test_an_escape_is_needed_if_its_dropped_bits_are_not_zero(impl):
    layout = WholeLayout(
        number_format=BF16, weights=1, widths=(1,), exponents=((0x7F,),), dropped_bits=7
    )
    # a stripe of the sign, a stripe of the tier, and two bytes: exponent · 128 + dropped bits
    assert decode(bytes([1, 1, 0x81, 0x3F]), layout, 1, impl) == [0xBF81]
    assert decode(bytes([1, 1, 0x00, 0x3F]), layout, 1, impl) == [0xBF00]
    assert decode(bytes([1, 1, 0x80, 0x3F]), layout, 1, impl) == ESCAPE
    assert decode(bytes([1, 1, 0x81, 0x7F]), layout, 1, impl) == [0xFF81]
    assert decode(bytes([1, 1, 0x81, 0xBF]), layout, 1, impl) == ESCAPE  # an exponent of 9 bits


@impls
@pytest.mark.parametrize(("exponent", "taken"), [(31, True), (32, False), (255, False)])
def test_an_escape_past_the_exponents_of_its_format_is_refused(exponent, taken, impl):
    layout = WholeLayout(number_format=F16, weights=1, widths=(1,), exponents=lists_of([15]))
    found = decode(bytes([0, 0, 0, 0, 1, exponent]), layout, 1, impl)
    assert found == ([exponent << 10] if taken else ESCAPE)


@impls
def test_a_damaged_record_is_named_by_its_number(impl):
    layout = WholeLayout(number_format=BF16, weights=4, widths=(1,), exponents=lists_of([0x7E]))
    packed = pack_whole(WEIGHTS, layout, impl="reference")
    payload = packed.payload.copy()
    payload[packed.lengths[0] + 4] |= 0x80  # the tier of the second record
    with pytest.raises(DamagedRowError) as caught:
        unpack_whole(payload, packed.lengths, layout, np.empty(10, np.uint16), impl=impl)
    assert (caught.value.row, caught.value.fault) == (1, STRIPE)


def taken(lengths, nbytes, out=(10,), dtype=np.uint16):
    unpack_whole(
        np.zeros(nbytes, np.uint8), np.array(lengths, np.int64), EXAMPLE, np.empty(out, dtype)
    )


@pytest.mark.parametrize(
    ("lengths", "nbytes", "row", "fault"),
    [
        ([-1], 0, 0, "its length, -1 bytes, is impossible"),
        # ten values, three stripes of two bytes, and ten escapes of a byte
        ([27], 27, 0, "its length, 27 bytes, is impossible"),
        ([20, 2**62], 40, 1, f"its length, {2**62} bytes, is impossible"),
        ([15, 15], 29, 1, "the row table says 30 bytes of records, there are 29"),
    ],
)
def test_lengths_that_cannot_be_are_refused(lengths, nbytes, row, fault):
    with pytest.raises(DamagedRowError) as caught:
        taken(lengths, nbytes, (10 * len(lengths),))
    assert (caught.value.row, caught.value.fault) == (row, fault)


@pytest.mark.parametrize(
    ("lengths", "out", "dtype"),
    [([15], (11,), np.uint16), ([15, 15], (10,), np.uint16), ([15], (10,), np.uint32)],
)
def test_weights_that_other_records_would_hold_are_refused(lengths, out, dtype):
    with pytest.raises(ValueError, match=r"that must be .*uint16.*as many weights"):
        taken(lengths, sum(lengths), out, dtype)


def test_weights_that_lie_scattered_are_refused():
    with pytest.raises(ValueError, match="C-contiguous"):
        unpack_whole(
            np.frombuffer(RECORD, np.uint8), np.array([15]), EXAMPLE, np.empty(20, np.uint16)[::2]
        )


def test_all_tiers_and_all_exponents_of_a_format_may_be_used():
    assert_all_agree(
        make_rows("any finite bits", F32, (1, 999))[0],
        WholeLayout(
            number_format=F32, weights=500, widths=(3,) * 8, exponents=lists_of(range(100, 156))
        ),
    )
    full = WholeLayout(
        number_format=F16, weights=200, widths=(3, 3, 3, 3, 2, 1), exponents=lists_of(range(32))
    )
    packed = assert_all_agree(make_rows("any finite bits", F16, (1, 999))[0], full)
    assert by_specification(b"", full, 1) is None
    assert packed.lengths.size == 5


@st.composite
def damaged_records(draw):
    """A layout, how many weights, and a record that was changed somewhere, or is random."""
    layout, weights = draw(tensors())
    count = min(weights.size, layout.weights)
    packed = pack_whole(weights[:count], layout, impl="reference")
    record = bytearray(packed.payload.tobytes())
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    tail = 2 + len(record) // 3
    for _ in range(draw(st.integers(1, 3))):
        how = draw(st.sampled_from(["flip", "flip", "set", "cut", "lengthen", "swap"]))
        # what says how long a record is stands behind the values
        at = len(record) - 1 - int(rng.integers(min(tail, len(record)))) if record else 0
        if how == "flip" and record:
            record[at] ^= 1 << int(rng.integers(8))
        elif how == "set" and record:
            record[at] = rng.choice([0, 0xFF, 0x80, 1])
        elif how == "cut":
            del record[len(record) - draw(st.integers(0, min(9, len(record)))) :]
        elif how == "lengthen":
            record += rng.bytes(draw(st.integers(1, 9)))
        elif record:
            record[at], record[0] = record[0], record[at]
    return layout, count, bytes(record[: layout.longest_record])


@settings(max_examples=300, deadline=None)
@given(damaged_records())
def test_any_record_decodes_as_specified_or_is_refused_whatever_lies_around_it(damaged):
    layout, count, record = damaged
    expected = by_specification(record, layout, count)
    outcomes = [decode(record, layout, count, "reference")]
    outcomes += [
        decode(record, layout, count, impl, surroundings)
        for impl in ("scalar", "simd")
        for surroundings in (0, 0xFF)
    ]
    for outcome in outcomes:
        assert outcome == outcomes[0]
    if expected is None:
        assert outcomes[0] in (LENGTH, STRIPE, ESCAPE)
    else:
        assert outcomes[0] == expected
