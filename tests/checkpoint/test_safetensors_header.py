"""Headers are read as the safetensors library reads them, and refused where it refuses them."""

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from emp_llm.checkpoint.dtypes import ITEM_BITS
from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.safetensors_header import ALIGNMENT, encode_header, read_header
from emp_llm.errors import CheckpointError


def pack(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def u8(start: int, end: int, **fields: object) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]} | fields


def refusal(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert message.startswith("model.safetensors: ")
    assert "\n" not in message
    return message


def test_a_header_written_by_hand_is_read_to_the_byte(tmp_path: Path) -> None:
    # 8 bytes of length, 140 of JSON; b lies first although a is named first
    text = (
        b'{"__metadata__":{"format":"pt"},'
        b'"a":{"dtype":"BF16","shape":[3],"data_offsets":[4,10]},'
        b'"b":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}'
    )
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack(text.ljust(140), b"0123456789"))
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert header.tensors == (
        TensorEntry("b", "F32", (), 148, 152),
        TensorEntry("a", "BF16", (3,), 152, 158),
    )
    assert (header.data_start, header.file_size) == (148, 158)
    assert [entry.nbytes for entry in header.tensors] == [4, 6]


def test_a_file_of_save_file_is_read_as_the_library_reads_it(tmp_path: Path) -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
    dtypes += [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.uint16]
    tensors = {f"t.{i}": torch.ones(i, 3).to(dtype) for i, dtype in enumerate(dtypes)}
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt", "ü": "\n"})
    header = read_header(path)
    content = path.read_bytes()
    expected = dict(safetensors.deserialize(content))
    assert {entry.name for entry in header.tensors} == expected.keys()
    for entry in header.tensors:
        assert entry.dtype == expected[entry.name]["dtype"]
        assert list(entry.shape) == expected[entry.name]["shape"]
        assert content[entry.start : entry.end] == bytes(expected[entry.name]["data"])
    with safetensors.safe_open(path, "pt") as file:
        assert header.metadata == file.metadata()
        assert [entry.name for entry in header.tensors if entry.nbytes] == [
            name for name in file.offset_keys() if name != "t.0"
        ]


def test_a_file_without_tensors_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({}, path)
    assert read_header(path).tensors == ()


def test_empty_tensors_may_share_their_place_with_others(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(pack({"a": u8(0, 1), "b": u8(0, 0), "c": u8(1, 1)}, b"x"))
    assert [entry.name for entry in read_header(path).tensors] == ["b", "a", "c"]


def test_the_dtypes_are_those_of_the_library() -> None:
    message = str(library_refusal(pack({"a": u8(0, 1, dtype="NEW")}, b"x")))
    known = message.split("expected one of ")[1].split(" at line")[0]
    assert set(known.replace("`", "").split(", ")) == set(ITEM_BITS)
    for dtype, bits in ITEM_BITS.items():
        entry = {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}
        safetensors.deserialize(pack({"a": entry}, bytes(bits)))


def library_refusal(content: bytes) -> Exception:
    with pytest.raises(safetensors.SafetensorError) as caught:
        safetensors.deserialize(content)
    return caught.value


BAD = {
    "no bytes": (b"", "is 0 bytes, too short"),
    "seven bytes": (bytes(7), "is 7 bytes, too short"),
    "a header over the limit": (struct.pack("<Q", 100_000_001), "over the limit of 64,000,000"),
    "a header past the end": (
        struct.pack("<Q", 100) + b"{}",
        "is 10 bytes, its header alone needs 108; the file is cut short",
    ),
    "an empty header": (pack(b""), "not JSON"),
    "latin-1": (pack(b'{"\xfc":1}'), "not UTF-8"),
    "half a character": (pack({"\ud800": u8(0, 1)}, b"x"), "not UTF-8"),
    "half a JSON": (pack(b'{"a":'), "not JSON"),
    "a byte-order mark": (pack("\ufeff{}".encode()), "not JSON"),
    "NaN": (pack(b'{"a":NaN}'), "NaN is not a JSON number"),
    "a list": (pack([]), "must be a JSON object"),
    "depth": (pack(b'{"a":' + b"[" * 100_000), "too deep"),
    "a field twice": (
        pack(b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"x"),
        "has 'dtype' twice",
    ),
    "metadata of a number": (pack({"__metadata__": {"a": 1}}), "has 1 at 'a'"),
    "metadata of a list": (pack({"__metadata__": []}), "must map strings to strings"),
    "a tensor of a number": (pack({"a": 1}), "tensor 'a' is 1"),
    "no dtype": (pack({"a": {"shape": [], "data_offsets": [0, 1]}}, b"x"), "has dtype None"),
    "an unknown dtype": (pack({"a": u8(0, 1, dtype="F128")}, b"x"), "has dtype 'F128'"),
    "a dtype of a list": (pack({"a": u8(0, 1, dtype=[])}, b"x"), "has dtype []"),
    "a negative size": (pack({"a": u8(0, 1, shape=[-1])}, b"x"), "has shape [-1]"),
    "a size of true": (pack({"a": u8(0, 1, shape=[True])}, b"x"), "has shape [True]"),
    "a size of 1.0": (pack({"a": u8(0, 1, shape=[1.0])}, b"x"), "has shape [1.0]"),
    "a size of 2**64": (pack({"a": u8(0, 0, shape=[2**64, 0])}), "has shape [18446744073709551616"),
    "no shape": (pack({"a": {"dtype": "U8", "data_offsets": [0, 1]}}, b"x"), "has shape None"),
    "an overflow": (pack({"a": u8(0, 0, shape=[2**40, 2**40, 0])}), "overflows 64 bits"),
    "an overflow of bits": (pack({"a": u8(0, 0, shape=[2**61])}), "overflows 64 bits"),
    "half a byte": (pack({"a": u8(0, 2, dtype="F4", shape=[3])}, b"xx"), "fill whole bytes"),
    "too few bytes": (pack({"a": u8(0, 1, shape=[2])}, b"x"), "1 bytes of data, U8 [2] needs 2"),
    "one offset": (pack({"a": u8(0, 1, data_offsets=[0])}, b"x"), "has data_offsets [0]"),
    "a negative offset": (pack({"a": u8(-1, 0)}, b"x"), "has data_offsets [-1, 0]"),
    "reversed offsets": (pack({"a": u8(0, 1, data_offsets=[1, 0])}, b"x"), "data_offsets [1, 0]"),
    "an overlap": (pack({"a": u8(0, 2), "b": u8(1, 3)}, b"xxx"), "'b' overlaps another"),
    "a hole": (pack({"a": u8(0, 1), "b": u8(2, 3)}, b"xxx"), "'b' follows a hole"),
    "a hole at the front": (pack({"a": u8(1, 2)}, b"xx"), "'a' follows a hole"),
    "data cut short": (
        pack({"a": u8(0, 5)}, b"xxxx"),
        "is 72 bytes, its header promises 73: download it again",
    ),
    "data past the end": (
        pack({"a": u8(0, 5)}, b"xxxxxx"),
        "is 74 bytes, its header promises 73: download it again",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_the_library_refuses_is_refused_with_a_reason(case: str, tmp_path: Path) -> None:
    content, reason = BAD[case]
    library_refusal(content)
    assert reason in refusal(tmp_path, content)


def test_one_name_for_two_tensors_is_refused_where_the_library_takes_the_last(
    tmp_path: Path,
) -> None:
    text = f'{{"a":{json.dumps(u8(0, 1))},"a":{json.dumps(u8(0, 1))}}}'
    content = pack(text.encode(), b"x")
    assert len(safetensors.deserialize(content)) == 1
    assert "its header has 'a' twice" in refusal(tmp_path, content)


def test_a_git_lfs_pointer_is_named_as_such(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    assert "run `git lfs pull`" in refusal(tmp_path, pointer)


def test_a_long_name_does_not_flood_the_message(tmp_path: Path) -> None:
    assert len(refusal(tmp_path, pack({"n" * 10_000: 1}))) < 400


def test_a_tensor_has_no_more_dimensions_than_torch_knows(tmp_path: Path) -> None:
    # of the last one the exact product has six million digits and would take minutes
    (tmp_path / "model.safetensors").write_bytes(pack({"a": u8(0, 1, shape=[1] * 64)}, b"x"))
    assert read_header(tmp_path / "model.safetensors").tensors[0].shape == (1,) * 64
    for shape, count in ([1] * 65, "65"), ([2**63] * 300_000, "300,000"):
        content = pack({"a": u8(0, 1, shape=shape)}, b"x")
        assert f"'a' has {count} dimensions, more than 64" in refusal(tmp_path, content)


def test_a_name_has_no_more_than_1024_characters(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(pack({"n" * 1024: u8(0, 1)}, b"x"))
    assert read_header(tmp_path / "model.safetensors").tensors[0].name == "n" * 1024
    assert "a name of 1,025 characters" in refusal(tmp_path, pack({"n" * 1025: u8(0, 1)}, b"x"))


# The library would take these; read in Python they would fill gigabytes


def test_a_header_is_at_most_64_million_bytes_long(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 64_000_000) + b"{}".ljust(64_000_000))
    assert read_header(path).tensors == ()
    longer = struct.pack("<Q", 64_000_001) + b"{}".ljust(64_000_001)
    assert len(safetensors.deserialize(longer)) == 0
    assert "64,000,001 bytes long, over the limit of 64,000,000" in refusal(tmp_path, longer)


def test_a_header_has_at_most_four_million_values(tmp_path: Path) -> None:
    # two for the object and the list, one for each comma
    for commas, reason in (3_999_998, "tensor 'a' is [0, 0, "), (3_999_999, "4,000,000 values"):
        assert reason in refusal(tmp_path, pack(b'{"a":[' + b"0," * commas + b"0]}"))


def test_a_missing_file_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none.safetensors: cannot be read: No such file"):
        read_header(tmp_path / "none.safetensors")


ENTRIES = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"])).filter(lambda name: name != "__metadata__"),
    st.tuples(st.sampled_from(sorted(ITEM_BITS)), st.lists(st.integers(0, 5), max_size=3)),
    max_size=6,
)


def described(tensors: dict[str, tuple[str, list[int]]]) -> list[tuple[str, str, tuple, int]]:
    """Entries for encode_header, the last size rounded up so that items fill whole bytes."""
    entries = []
    for name, (dtype, sizes) in tensors.items():
        shape = (*sizes, 4)
        entries.append((name, dtype, shape, math.prod(shape) * ITEM_BITS[dtype] // 8))
    return entries


@given(ENTRIES, st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.just("é")))
def test_what_is_encoded_is_what_the_library_and_we_read(tmp_path_factory, tensors, metadata):
    entries = described(tensors)
    header = encode_header(entries, metadata)
    assert len(header) % ALIGNMENT == 0
    data = np.random.default_rng(0).bytes(sum(nbytes for *_, nbytes in entries))
    path = tmp_path_factory.getbasetemp() / "x.safetensors"
    path.write_bytes(header + data)
    read = read_header(path)
    assert read.metadata == metadata
    assert read.data_start == len(header)
    expected, position = {}, len(header)
    for name, dtype, shape, nbytes in entries:
        expected[name] = TensorEntry(name, dtype, shape, position, position + nbytes)
        position += nbytes
    assert {entry.name: entry for entry in read.tensors} == expected
    theirs = dict(safetensors.deserialize(header + data))
    assert theirs.keys() == expected.keys()
    for name, entry in expected.items():
        assert (theirs[name]["dtype"], tuple(theirs[name]["shape"])) == (entry.dtype, entry.shape)
        assert bytes(theirs[name]["data"]) == (header + data)[entry.start : entry.end]


def test_an_encoded_header_is_these_bytes() -> None:
    # 8 bytes of length and 83 of JSON are 91, and the next multiple of 16 is 96 = 8 + 0x58
    text = b'{"__metadata__":{"k":"v"},"w":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]}}'
    header = encode_header([("w", "BF16", (2, 3), 12)], {"k": "v"})
    assert header == b"\x58" + bytes(7) + text + b" " * 5


def test_reserved_room_is_filled_with_spaces_that_the_library_accepts(tmp_path: Path) -> None:
    header = encode_header([("w", "U8", (2,), 2)], reserve=4096)
    assert len(header) == 4096
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + b"ab")
    with safetensors.safe_open(path, "np") as file:
        assert file.get_tensor("w").tolist() == [97, 98]


@pytest.mark.parametrize("reserve", [0, 48, 72])
def test_reserved_room_must_be_enough_and_aligned(reserve: int) -> None:
    # 8 bytes of length and 53 of JSON are 61: 64 is the least that holds them
    entries = [("w", "U8", (2,), 2)]
    assert len(encode_header(entries, reserve=64)) == 64
    with pytest.raises(ValueError, match=f"needs 61 bytes, {reserve} were reserved"):
        encode_header(entries, reserve=reserve)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([("w", "U8", (2,), 3)], "is not 3 bytes"),
        ([("w", "F4", (3,), 2)], "whole bytes"),
        ([("w", "U8", (1,), 1), ("w", "U8", (1,), 1)], "two tensors are called 'w'"),
        ([("__metadata__", "U8", (1,), 1)], "two tensors are called '__metadata__'"),
    ],
)
def test_entries_that_contradict_themselves_are_not_encoded(entries, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        encode_header(entries)


def test_a_header_that_would_be_refused_for_its_size_is_not_encoded() -> None:
    entry = ("n", "U8", (1,), 1)
    with pytest.raises(CheckpointError, match=r"longer than the 64,000,000 bytes .*in more shards"):
        encode_header([entry], {"note": "x" * 64_000_000})
    with pytest.raises(CheckpointError, match=r"more than the 4,000,000 values .*in more shards"):
        encode_header([entry], {"note": "," * 4_000_000})
    with pytest.raises(CheckpointError, match=r"a name of 1,025 characters"):
        encode_header([("n" * 1025, "U8", (1,), 1)])
