"""Planes of version 2 that are damaged or contradict each other end as one clear error."""

import numpy as np
import pytest
from emp_kernels.numbers import BF16, F16
from emp_kernels.rows import Workspace
from support.packing import open_packed, pack, pack_all, save_planes, whole_tensor
from support.rows import make_rows, to_bits

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.source_file import PlainFile
from emp_llm.errors import FormatError
from emp_llm.tensors import geometry as geometry_module
from emp_llm.tensors import whole_reader
from emp_llm.tensors.whole import WholeTensor

LIST = int.from_bytes(bytes([126, 125, 124, 123]), "little")
OTHER = int.from_bytes(bytes([125, 126, 124, 123]), "little")
GOOD = [2, 1, 0, 10, 0x21, *[LIST, *[0] * 7] * 3, OTHER, *[0] * 7, 4, 5, 0]
"""bfloat16, nothing dropped, 10 weights a record, tiers of 1 and 2 bits; a tensor of 4 × 5."""


def meta(*changes, fields=GOOD):
    changed = list(fields)
    for index, value in changes:
        changed[index] = value
    return np.array(changed, "<i8").tobytes()


def listed(*exponents):
    return int.from_bytes(bytes(exponents), "little")


def refusal(data):
    with pytest.raises(FormatError) as caught:
        WholeTensor.decode_meta("embed", data)
    message = str(caught.value)
    assert message.startswith("'embed': its emp_meta ")
    assert message.isprintable()
    return message


def test_good_parameters_are_read():
    whole = WholeTensor.decode_meta("x", meta())
    assert whole.geometry.shape == (4, 5)
    assert whole.geometry.records == 2
    assert whole.layout.widths == (1, 2)
    assert whole.layout.exponents == (*[(126, 125, 124, 123)] * 3, (125, 126, 124, 123))


IMPOSSIBLE = {
    "number format 0": ((1, 0), "no number format 0"),
    "number format 4": ((1, 4), "no number format 4"),
    "more bits dropped than there are": ((2, 8), "dropped_bits is 8"),
    "bits dropped below zero": ((2, -1), "dropped_bits is -1"),
    "records of no weights": ((3, 0), "its records have 0 weights"),
    "records of fewer": ((3, -10), "its records have -10 weights"),
    "records that part a row": ((3, 7), "its records have 7 weights, its rows 5"),
    "records of 5 · 2**20 weights": ((3, 5 << 20), "its records have 5242880 weights"),
    "no tiers": ((4, 0), "its tiers are 0"),
    "tiers below zero": ((4, -1), "its tiers are -1"),
    "nine tiers": ((4, 1 << 32 | 0x1111_1111), "its tiers are 4581298449"),
    "a tier of no bits": ((4, 0x201), "each has 1 to 3"),
    "a tier of 4 bits": ((4, 0x41), "each has 1 to 3"),
    "a tier of 15 bits": ((4, 0xF), "each has 1 to 3"),
    "an exponent twice": ((5, listed(126, 125, 124, 126)), "4 exponents; the tiers need 4 diff"),
    "more exponents than the tiers take": ((5, listed(126, 125, 124, 123, 9)), "has bytes set"),
    "more in another list": ((29, listed(126, 125, 124, 123, 9)), "has bytes set"),
    "a last byte of a list": ((12, 1 << 56), "has bytes set"),
    "a last byte of the last list": ((36, 1 << 56), "has bytes set"),
    "lists of different exponents": ((21, listed(126, 125, 124, 122)), "not all the same exponen"),
    "an exponent twice in another list": ((13, listed(126, 125, 124, 124)), "not all the same"),
    "fewer in another list": ((13, listed(126, 125, 124)), "not all the same exponents"),
    "a list for a bit that is dropped": ((2, 6), "has bytes set"),
    "lists for two bits that are dropped": ((2, 7), "has bytes set"),
    "fewer exponents than the tiers take": ((4, 0x3), "the tiers need 7 different"),
    "one dimension": ((38, 0), "its shape is [4]"),
    "a negative size": ((37, -4), "its shape is [-4, 5]"),
    "a size of zero among others": ((37, 0), "its shape is [0, 5]"),
    "2**24 + 1 rows": ((37, 2**24 + 1), "16,777,217 rows"),
    "weights past 64 bits": ((37, 2**62), "rows; emp-llm takes up to"),
}


@pytest.mark.parametrize(("change", "why"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_parameters_that_describe_nothing_are_refused(change, why):
    assert why in refusal(meta(change))


def test_sizes_past_the_limits_are_refused():
    assert "4194305 weights" in refusal(meta((3, 2**22 + 1), (38, 2**22 + 1)))
    refusal(meta(fields=[*GOOD[:3], 2, *GOOD[4:37], *[2] * 9]))  # nine dimensions
    rows = [2**12, 2**12 + 1]  # they count together
    assert "16,781,312 rows" in refusal(meta(fields=[*GOOD[:37], *rows, 5]))


@pytest.mark.parametrize("exponents", [(15, 14, 13, 32), (15, 14, 13, 255)])
def test_exponents_that_the_format_lacks_are_refused(exponents):
    assert "an exponent has 5 bits" in refusal(meta((1, 2), (5, listed(*exponents))))


def test_more_exponents_than_the_format_has_are_refused():
    numbers = np.arange(64, dtype=np.uint8).view("<i8").tolist()
    fields = [2, 2, 0, 10, 0x33333, *numbers * 4, 4, 5, 0]
    assert "have room for 35 exponents" in refusal(meta(fields=fields))


@pytest.mark.parametrize("count", range(39))
def test_parameters_that_are_cut_short_are_refused(count):
    refusal(meta()[: 8 * count])


@pytest.mark.parametrize("zeros", [1, 2, 1000])
def test_parameters_of_more_fields_than_the_shape_needs_are_refused(zeros):
    assert "or fields" in refusal(meta(fields=[*GOOD, *[0] * zeros]))


DENSE = make_rows("gaussian", BF16, (6, 40))


def usual(shape=(6, 40)):
    """Weights of scale 0.02 have exponents around 121; two rows a record."""
    return whole_tensor(shape, BF16, exponents=(121, 120, 119, 117))


@pytest.fixture
def planes():
    return pack_all("x", DENSE, usual())


@pytest.fixture
def opened(tmp_path):
    """Opens planes as a file's packed tensor."""
    files = []

    def open_planes(planes):
        path = tmp_path / "a.safetensors"
        save_planes(path, planes)
        files.append(PlainFile(path))
        return open_packed(path, files[-1])["x"]

    yield open_planes
    for file in files:
        file.close()


def decode_all(reader):
    workspace = Workspace()
    blocks = reader.geometry.row_blocks()
    return np.concatenate([reader.read(block, workspace).rows.copy() for block in blocks])


def lengths_of(planes):
    return planes["x.emp_rows"].view("<u4")


def test_a_reader_tells_what_the_tensor_is_in_a_dense_file(opened, planes):
    reader = opened(planes)
    assert reader.dense_entry == TensorEntry("x", "BF16", (6, 40), 0, 480)
    assert reader.kept == 240


@pytest.mark.parametrize("block_bytes", [1, 160, 4 << 20])
@pytest.mark.parametrize("at_a_time", [1, 2, 1 << 18])
def test_row_blocks_start_where_their_records_do(
    opened, planes, monkeypatch, block_bytes, at_a_time
):
    monkeypatch.setattr(geometry_module, "ROW_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(whole_reader, "_TABLE_RECORDS", at_a_time)
    reader = opened(planes)
    stored = [reader.block_bytes(block) for block in reader.geometry.row_blocks()]
    lengths = lengths_of(planes)[:3].tolist()
    assert stored == ([sum(lengths)] if block_bytes > 160 else lengths)
    np.testing.assert_array_equal(decode_all(reader), DENSE)
    whole = b"".join(planes[name].tobytes() for name in ("x", "x.emp_rows", "x.emp_meta"))
    assert reader.end_bytes == whole[sum(lengths) :]


def test_a_table_of_another_length_is_refused(opened, planes):
    table = planes["x.emp_rows"]
    for other in (table[:0], np.append(table, np.uint8([0] * 16))):
        with pytest.raises(
            FormatError, match=r"row table has \d+ bytes, its shape \[6, 40\] needs 16"
        ):
            opened(planes | {"x.emp_rows": other})


def test_records_of_another_length_are_refused(opened, planes):
    for records in (planes["x"][:-16], np.append(planes["x"], np.uint8([0] * 16)), planes["x"][:0]):
        with pytest.raises(
            FormatError, match=r"a\.safetensors: packed tensor 'x' is damaged: its rec"
        ):
            opened(planes | {"x": records})


@pytest.mark.parametrize("length", [80 + 10 + 20 + 80 + 1, 2**31, 2**32 - 1])
def test_a_length_that_no_record_has_is_refused_with_its_number(opened, planes, length):
    # 80 values, a stripe and two of 10 bytes, 80 escapes: no record has more
    table = planes["x.emp_rows"].copy()
    table.view("<u4")[2] = length
    with pytest.raises(FormatError, match=f"record 2: its length, {length}, is impossible"):
        opened(planes | {"x.emp_rows": table})


def test_padding_that_is_not_zero_is_refused(opened, planes):
    assert lengths_of(planes).sum() % 16
    for name in ("x", "x.emp_rows"):
        plane = planes[name].copy()
        plane[-1] = 1
        with pytest.raises(FormatError, match=f"the padding of '{name}' is not zero"):
            opened(planes | {name: plane})


def test_a_damaged_record_is_named_by_its_number_in_the_tensor(opened, planes, monkeypatch):
    monkeypatch.setattr(geometry_module, "ROW_BLOCK_BYTES", 160)  # a record each
    table = planes["x.emp_rows"].copy()
    table.view("<i4")[1:3] += [1, -1]  # a byte of the third record goes to the second
    reader = opened(planes | {"x.emp_rows": table})
    with pytest.raises(
        FormatError, match=r"^a\.safetensors: packed tensor 'x' is damaged: record 1: it is longer"
    ):
        decode_all(reader)


def test_parameters_of_one_version_and_records_of_the_other_are_refused(opened, planes):
    pruned = pack("x", to_bits(np.ones((6, 40)), BF16), BF16)
    with pytest.raises(FormatError, match=r"its row table has 48 bytes, its shape .* needs 16"):
        opened(pruned | {"x.emp_meta": planes["x.emp_meta"]})
    with pytest.raises(FormatError, match=r"its row table has 16 bytes, its shape .* needs 48"):
        opened(planes | {"x.emp_meta": pruned["x.emp_meta"]})
    for fields, why in (
        ([1, *planes["x.emp_meta"][1:]], "its shape is"),
        ([2, *pruned["x.emp_meta"][1:]], "it has fewer than 37 fields"),
    ):
        with pytest.raises(FormatError, match=f"is not that of a packed tensor: {why}"):
            opened(planes | {"x.emp_meta": np.array(fields)})


def test_a_few_bytes_do_not_claim_many_weights(opened):
    tensor = whole_tensor((2**20, 2**12), F16, record_rows=2**10)
    planes = {
        "x": np.zeros(0, np.uint8),
        "x.emp_rows": np.zeros(tensor.table_bytes, np.uint8),
        "x.emp_meta": np.frombuffer(tensor.encode_meta(), np.int64),
    }
    with pytest.raises(FormatError, match="would have 8,589,934,592 unpacked"):
        opened(planes)


@pytest.mark.parametrize("seed", range(10))
def test_flipped_bits_decode_or_are_refused_and_nothing_else(opened, planes, seed):
    rng = np.random.default_rng(seed)
    for _ in range(10):
        damaged = {name: plane.copy() for name, plane in planes.items()}
        name = rng.choice(list(damaged))
        damaged[name].view(np.uint8)[rng.integers(damaged[name].nbytes)] ^= 1 << rng.integers(8)
        try:
            decode_all(opened(damaged))
        except FormatError as error:
            assert str(error).startswith("a.safetensors: ")  # noqa: PT017 (both ends are right)
