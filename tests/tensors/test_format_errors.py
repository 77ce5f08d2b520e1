"""Planes that are damaged, missing or of another version end as one clear error."""

import numpy as np
import pytest
from emp_kernels.numbers import BF16
from emp_kernels.rows import Workspace
from support.packing import open_packed, pack, save_planes
from support.rows import make_rows

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.source_file import PlainFile
from emp_llm.errors import FormatError
from emp_llm.tensors import geometry as geometry_module
from emp_llm.tensors.packed import PackedTensor
from emp_llm.tensors.planes import find_packed

GOOD = [1, 1, 0, 3, 1, 0, 4, 5]  # version, bfloat16, dropped, radix, align, transposed, 4 × 5


def meta(*changes, fields=GOOD):
    changed = list(fields)
    for index, value in changes:
        changed[index] = value
    return np.array(changed, "<i8").tobytes()


def meta_refusal(data):
    with pytest.raises(FormatError) as caught:
        PackedTensor.decode_meta("layers.0.up", data)
    message = str(caught.value)
    assert "'layers.0.up'" in message
    assert "\n" not in message
    return message


def test_good_parameters_are_read():
    packed = PackedTensor.decode_meta("x", meta())
    assert packed.geometry.shape == (4, 5)
    assert (packed.layout.columns, packed.layout.radix, packed.layout.align) == (5, 3, 1)


IMPOSSIBLE = {
    "number format 0": meta((1, 0)),
    "number format 4": meta((1, 4)),
    "more bits dropped than there are": meta((2, 8)),
    "bits dropped below zero": meta((2, -1)),
    "radix 0": meta((3, 0)),
    "radix 5": meta((3, 5)),
    "radix 2**40": meta((3, 2**40)),
    "align 0": meta((4, 0)),
    "align 3": meta((4, 3)),
    "align 128": meta((4, 128)),
    "transposed 2": meta((5, 2)),
    "transposed −1": meta((5, -1)),
    "one dimension": meta((7, 0)),
    "no dimensions": meta((6, 0), (7, 0)),
    "a negative size": meta((6, -4)),
    "two negative sizes": meta((6, -4), (7, -5)),
    "a size of zero among others": meta((6, 0)),
    "nine dimensions": meta(fields=[1, 1, 0, 3, 1, 0, *[2] * 9, 0]),
    "2**22 + 1 columns": meta((6, 2), (7, 2**22 + 1)),
    "2**22 + 1 columns of a transposed tensor": meta((5, 1), (6, 2**22 + 1), (7, 2)),
    "2**24 + 1 rows": meta((6, 2**24 + 1), (7, 2)),
    "2**16 + 1 matrices": meta(fields=[1, 1, 0, 3, 1, 0, 2**16 + 1, 1, 2, 0]),
    "2**48 weights": meta((6, 2**24), (7, 2**24)),
    "weights past 64 bits": meta((6, 2**62), (7, 2**62)),
}


@pytest.mark.parametrize("data", IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_parameters_that_describe_nothing_are_refused(data):
    assert "emp_meta" in meta_refusal(data)


@pytest.mark.parametrize("count", range(8))
def test_parameters_that_are_cut_short_are_refused(count):
    meta_refusal(meta()[: 8 * count])


def entries(**changes):
    """Entries of a packed tensor's planes and a plain one; a change of None takes one away."""
    kinds = {
        "x": ("U8", (160,), 160),
        "x.emp_rows": ("U8", (16,), 16),
        "x.emp_meta": ("I64", (8,), 64),
        "norm": ("F32", (2,), 8),
    } | changes
    found, at = [], 100
    for name, kind in kinds.items():
        if kind is not None:
            dtype, shape, nbytes = kind
            found.append(TensorEntry(name, dtype, shape, at, at + nbytes))
            at += nbytes
    return found


def test_planes_are_told_from_plain_tensors_in_any_order():
    tensors = entries()
    for order in (tensors, tensors[::-1]):
        packed, plain = find_packed("a.safetensors", order)
        assert [entry.name for entry in plain] == ["norm"]
        assert list(packed) == ["x"]
        names = [packed["x"].records.name, packed["x"].rows.name, packed["x"].meta.name]
        assert names == ["x", "x.emp_rows", "x.emp_meta"]
        assert packed["x"].nbytes == 160 + 16 + 64


def test_a_shard_without_packed_tensors_is_all_plain():
    tensors = entries(**{"x.emp_rows": None, "x.emp_meta": None})
    assert find_packed("a.safetensors", tensors) == ({}, tensors)


@pytest.mark.parametrize(("plane", "named"), [("x", "x"), ("x.emp_rows", "x.emp_rows")])
def test_a_missing_plane_is_named(plane, named):
    with pytest.raises(FormatError) as caught:
        find_packed("a.safetensors", entries(**{plane: None}))
    assert str(caught.value).startswith(
        f"a.safetensors: packed tensor 'x' lacks its plane {named!r}"
    )


@pytest.mark.parametrize("missing", [("x.emp_meta",), ("x.emp_meta", "x")])
def test_a_row_table_on_its_own_is_refused(missing):
    with pytest.raises(FormatError) as caught:
        find_packed("a.safetensors", entries(**dict.fromkeys(missing)))
    assert str(caught.value).startswith("a.safetensors: 'x.emp_rows' is there without its other")


@pytest.mark.parametrize(
    ("plane", "kind", "must"),
    [
        ("x", ("BF16", (80,), 160), "U8"),
        ("x", ("U8", (16, 10), 160), "U8"),
        ("x.emp_rows", ("U16", (8,), 16), "U8"),
        ("x.emp_meta", ("I32", (16,), 64), "I64"),
        ("x.emp_meta", ("I64", (2, 4), 64), "I64"),
        ("x.emp_meta", ("I64", (), 8), "I64"),
    ],
)
def test_a_plane_of_another_kind_is_refused(plane, kind, must):
    with pytest.raises(FormatError) as caught:
        find_packed("a.safetensors", entries(**{plane: kind}))
    dtype, shape, _ = kind
    expected = f"a.safetensors: plane {plane!r} is {dtype} {list(shape)}; it must be {must}"
    assert str(caught.value).startswith(expected)


@pytest.fixture
def planes():
    """The planes of six rows of 40 weights, which keep about 25 each."""
    return pack("x", make_rows("gaussian", BF16, (6, 40)), BF16)


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
    for block in reader.geometry.row_blocks():
        reader.read(block, workspace)


def test_a_reader_tells_what_the_tensor_is_in_a_dense_file(opened, planes):
    reader = opened(planes)
    assert reader.dense_entry == TensorEntry("x", "BF16", (6, 40), 0, 480)
    assert reader.kept == planes["x.emp_rows"].view("<u2")[:18:3].sum()


def test_the_end_of_a_packed_tensor_is_its_padding_table_and_parameters(opened, planes):
    reader = opened(planes)
    whole = b"".join(planes[name].tobytes() for name in ("x", "x.emp_rows", "x.emp_meta"))
    used = sum(reader.block_bytes(block) for block in reader.geometry.row_blocks())
    assert used < len(whole)
    assert reader.end_bytes == whole[used:]


@pytest.mark.parametrize("version", [0, 3, -1, 2**62])
def test_another_version_is_named_with_those_that_are_known(opened, planes, version):
    planes["x.emp_meta"] = np.array([version, *planes["x.emp_meta"][1:]])
    with pytest.raises(FormatError) as caught:
        opened(planes)
    assert str(caught.value) == (
        f"a.safetensors: 'x' is packed in version {version} of the format; this emp-llm reads "
        "versions 1 to 2: install a release that knows it"
    )


def test_a_row_table_of_another_length_is_refused(opened, planes):
    for table in (planes["x.emp_rows"][:-16], np.append(planes["x.emp_rows"], np.uint8([0] * 16))):
        with pytest.raises(
            FormatError, match=r"row table has \d+ bytes, its shape \[6, 40\] needs 48"
        ):
            opened(planes | {"x.emp_rows": table})


def test_records_of_another_length_are_refused(opened, planes):
    for records in (planes["x"][:-16], np.append(planes["x"], np.uint8([0] * 16)), planes["x"][:0]):
        with pytest.raises(
            FormatError, match=r"a\.safetensors: packed tensor 'x' is damaged: its rec"
        ):
            opened(planes | {"x": records})


def test_an_impossible_line_of_the_table_is_refused_with_its_row(opened, planes):
    table = planes["x.emp_rows"].copy()
    table.view("<u2")[3 * 4] = 41
    with pytest.raises(
        FormatError, match=r"row 4: its table line .* = \(41, 0, \d+\) is impossible"
    ):
        opened(planes | {"x.emp_rows": table})


def test_a_damaged_row_is_named_by_its_number_in_the_tensor(opened, planes, monkeypatch):
    monkeypatch.setattr(geometry_module, "ROW_BLOCK_BYTES", 160)  # two rows a block
    reader = opened(planes)
    fifth = sum(reader.block_bytes(block) for block in list(reader.geometry.row_blocks())[:2])
    records = planes["x"].copy()
    records[fifth] ^= 1
    with pytest.raises(FormatError, match=r"packed tensor 'x' is damaged: row 4: its mask names"):
        decode_all(opened(planes | {"x": records}))


@pytest.mark.parametrize("seed", range(20))
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


def test_padding_that_is_not_zero_is_refused(opened):
    planes = pack("x", make_rows("gaussian", BF16, (5, 40)), BF16)  # 30 bytes of numbers
    reader = opened(planes)
    assert sum(map(reader.block_bytes, reader.geometry.row_blocks())) < planes["x"].size
    for name in ("x", "x.emp_rows"):
        plane = planes[name].copy()
        plane[-1] = 1
        with pytest.raises(FormatError, match=f"the padding of '{name}' is not zero"):
            opened(planes | {name: plane})


def test_parameters_of_more_fields_than_the_shape_needs_are_refused(opened, planes):
    for zeros in (2, 1000):
        fields = np.append(planes["x.emp_meta"], np.zeros(zeros, np.int64))
        with pytest.raises(FormatError, match=r"its emp_meta has \d+ fields, more than its shape"):
            opened(planes | {"x.emp_meta": fields})


def test_a_plane_of_two_packed_tensors_is_refused():
    tensors = entries(
        **{"x.emp_rows.emp_rows": ("U8", (16,), 16), "x.emp_rows.emp_meta": ("I64", (8,), 64)}
    )
    with pytest.raises(FormatError, match=r"'x\.emp_rows' would be a plane of two packed tensors"):
        find_packed("a.safetensors", tensors)
