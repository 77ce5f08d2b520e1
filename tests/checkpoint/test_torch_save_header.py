"""What a file of torch.save holds is read without torch, data or code: as torch.load would."""

import collections
import io
import os
import pickle
import struct
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import bits

from emp_llm import CheckpointError
from emp_llm.checkpoint.torch_save.file import open_torch_file
from emp_llm.checkpoint.torch_save.header import read_torch_header, read_torch_header_by

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
BASE = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
WIDE = torch.arange(1500 * 1100).reshape(1500, 1100)
LAYOUTS = {
    "dense": BASE,
    "rows of another": BASE[10:20],
    "columns of another": BASE[:, 5:9],
    "one column": BASE[:, 3],
    "every seventh row, every third column": BASE[::7, ::3],
    "transposed": BASE.t(),
    "transposed, larger than what is read at once": WIDE.t(),
    "a few rows of a transposed one": WIDE.t()[3:9],
    "dimensions in another order": torch.arange(120).reshape(2, 3, 4, 5).permute(2, 0, 3, 1),
    "channels last": torch.randn(3, 5, 7, 7).to(memory_format=torch.channels_last),
    "expanded": torch.arange(4).expand(3, 4),
    "a scalar": torch.tensor(3.5),
    "empty": torch.zeros(0, 4),
    "a parameter": torch.nn.Parameter(BASE[:2].clone()),
}
FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def save(path: Path, content: object, *, zipped: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    return path


def check_as_torch_reads_it(path: Path, *, mmap: bool) -> None:
    expected = torch.load(path, weights_only=True, mmap=mmap)
    header = read_torch_header(path)
    file = open_torch_file(path)
    assert sorted(entry.name for entry in header.tensors) == sorted(expected)
    for entry in header.tensors:
        found = np.full(entry.nbytes, 0x5A, np.uint8)
        file.read_into(entry.start, found.data)
        tensor = expected[entry.name].detach()
        dtype, shape, data = bits(tensor)
        assert (DTYPES[entry.dtype], entry.shape, found.tobytes()) == (dtype, shape, data)
        for start, stop in ((0, 1), (entry.nbytes // 3, entry.nbytes * 2 // 3), (1, entry.nbytes)):
            part = np.full(max(0, min(stop, entry.nbytes) - start), 0x5A, np.uint8)
            file.read_into(entry.start + start, part.data)
            assert part.tobytes() == data[start:stop]
    file.close()


@FORMATS
def test_every_dtype_is_read_as_torch_reads_it(tmp_path: Path, zipped: bool) -> None:
    data = torch.randint(0, 256, (6, 48), dtype=torch.uint8)
    untyped_only = {torch.uint16, torch.uint32, torch.uint64}
    tensors = {
        name: (data % 2).bool() if dtype is torch.bool else data.view(dtype)
        for name, dtype in DTYPES.items()
        if zipped or (dtype not in untyped_only and not name.startswith("F8"))
    }
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    check_as_torch_reads_it(save(tmp_path / "a.bin", tensors, zipped=zipped), mmap=zipped)


@FORMATS
def test_every_layout_is_read_as_torch_reads_it(tmp_path: Path, zipped: bool) -> None:
    check_as_torch_reads_it(save(tmp_path / "a.bin", LAYOUTS, zipped=zipped), mmap=zipped)


@FORMATS
def test_tensors_that_are_the_same_bytes_are_known_to_be(tmp_path: Path, zipped: bool) -> None:
    tensors = {"a": BASE, "part": BASE[:9], "b": BASE, "other": BASE.clone()}
    header = read_torch_header(save(tmp_path / "a.bin", tensors, zipped=zipped))
    places = {entry.name: (entry.start, entry.end) for entry in header.tensors}
    assert places["a"] == places["b"]
    assert len(set(places.values())) == 3


def test_an_ordered_dict_with_metadata_and_tensors_with_attributes_are_read(tmp_path: Path) -> None:
    state = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2)).state_dict()
    assert isinstance(state, collections.OrderedDict)
    marked = torch.nn.Parameter(torch.ones(2))
    marked.tag = 1
    check_as_torch_reads_it(save(tmp_path / "a.bin", state), mmap=True)
    assert len(read_torch_header(save(tmp_path / "b.bin", {"x": marked})).tensors) == 1


def test_a_zip64_archive_is_read(tmp_path: Path) -> None:
    path = repacked(save(tmp_path / "a.bin", {"x": BASE, "y": BASE.t()}), force_zip64=True)
    check_as_torch_reads_it(path, mmap=False)


def repacked(path: Path, *, force_zip64: bool = False, **changes: bytes | None) -> Path:
    """The archive written anew, with some files of it changed or left out."""
    kept = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename.split("/", 1)[1]
            kept[info.filename] = changes.get(name.replace(".", "_"), archive.read(info))
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in kept.items():
            if data is not None:
                with archive.open(name, "w", force_zip64=force_zip64) as file:
                    file.write(data)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_torch_file(path)
    with pytest.raises(CheckpointError):
        read_torch_header(path)
    message = str(caught.value)
    assert message.startswith(f"{path.name}: ")
    assert "\n" not in message
    return message


class Hostile:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@FORMATS
def test_a_pickle_that_would_run_code_is_refused_by_name_and_runs_none(
    tmp_path: Path, zipped: bool
) -> None:
    mark = tmp_path / "it ran"
    content = {"x": BASE, "y": Hostile(os.system, f"touch '{mark}'")}
    message = refusal(save(tmp_path / "pytorch_model.bin", content, zipped=zipped))
    assert "its pickle calls posix.system, which would run code" in message
    assert not mark.exists()


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (eval, "builtins.eval"),
        (getattr, "builtins.getattr"),
        (torch.load, "torch.serialization.load"),
    ],
)
def test_nothing_but_the_parts_of_tensors_is_called(
    tmp_path: Path, function: object, name: str
) -> None:
    assert f"calls {name}," in refusal(save(tmp_path / "a.bin", {"x": Hostile(function, "1")}))


def test_a_whole_module_is_refused_by_its_class(tmp_path: Path) -> None:
    message = refusal(save(tmp_path / "a.bin", torch.nn.Linear(2, 2)))
    assert "calls torch.nn.modules.linear.Linear" in message


def raw_zip(path: Path, pickled: bytes, data: bytes = bytes(64)) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", data)
    return path


def tensor_pickle(count: int, offset: int, shape: tuple, strides: tuple) -> bytes:
    """A state dict with one float tensor, told as the arguments say."""

    class Tensor:
        def __reduce__(self) -> tuple:
            arguments = (Storage(), offset, shape, strides, False, collections.OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    class Storage:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, thing: object) -> object:
            kind = torch.FloatStorage
            return ("storage", kind, "0", "cpu", count) if isinstance(thing, Storage) else None

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"x": Tensor()})
    return buffer.getvalue()


def test_the_pickle_made_by_hand_is_one_that_torch_reads(tmp_path: Path) -> None:
    path = raw_zip(tmp_path / "a.bin", tensor_pickle(16, 2, (3, 2), (4, 1)), os.urandom(64))
    header = read_torch_header(path)
    assert [(entry.name, entry.dtype, entry.shape) for entry in header.tensors] == [
        ("x", "F32", (3, 2))
    ]


@pytest.mark.parametrize(
    ("count", "offset", "shape", "strides", "reason"),
    [
        (16, 0, (17,), (1,), "ends at byte 68 of a storage of 64 bytes"),
        (16, 15, (2,), (1,), "ends at byte 68"),
        (16, 0, (2, 2), (15, 1), "ends at byte 68"),
        (17, 0, (4,), (1,), "has 64 bytes of storage 0, which needs 68"),
        (16, -1, (4,), (1,), "has a damaged pickle"),
        (16, 4, (4,), (-1,), "has a damaged pickle"),
        (16, 0, (4, 1), (1,), "has a damaged pickle"),
        (16, 0, (2**40, 2**40), (0, 0), "has a damaged pickle"),
        (16, 0, (2**40,), (0,), "bytes of tensors, which is too many"),
    ],
)
def test_a_tensor_outside_its_storage_or_without_end_is_refused(
    tmp_path: Path, count: int, offset: int, shape: tuple, strides: tuple, reason: str
) -> None:
    path = raw_zip(tmp_path / "a.bin", tensor_pickle(count, offset, shape, strides))
    assert reason in refusal(path)


LEGACY_MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
BOMBS = {
    "a text of four gigabytes": b"\x80\x02X\xff\xff\xff\xff.",
    "a memory of four billion things": b"\x80\x02]r\xff\xff\xff\xff.",
    "an array of bytes of eight exabytes": b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "no end": b"\x80\x02" + b"]" * 10_000,
    "a number of a million digits": b"\x80\x02\x8b\x00\x00\x10\x00" + b"\x01" * (1 << 20) + b".",
    "a key that takes forever to hash": b"\x80\x02})" + b"2\x86" * 100 + b"Ns.",
    "a stack that is empty": b"\x80\x020.",
    "a call of nothing": b"\x80\x02))R.",
    "a list of which every call makes a copy": (
        b"\x80\x02ccollections\nOrderedDict\nq\x01](e"
        + b"".join(b"K%cN\x86a" % i for i in range(250))
        + b"q\x00"
        + b"h\x01h\x00\x85R" * 20_000
        + b"."
    ),
}


@pytest.mark.parametrize("case", BOMBS)
@FORMATS
def test_a_pickle_made_to_hurt_is_refused_in_little_memory(
    tmp_path: Path, case: str, zipped: bool
) -> None:
    path = tmp_path / "a.bin"
    if zipped:
        raw_zip(path, BOMBS[case])
    else:
        path.write_bytes(LEGACY_MAGIC + BOMBS[case])
    tracemalloc.start()
    try:
        refusal(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20


def test_keys_that_all_have_one_hash_are_refused(tmp_path: Path) -> None:
    content = {k * sys.hash_info.modulus: None for k in range(1, 100)}
    assert "has a damaged pickle" in refusal(save(tmp_path / "a.bin", content))


def test_a_line_without_an_end_is_refused_in_little_time(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"I" + b"1" * (8 << 20))
    start = time.process_time()
    assert "is not a file of torch.save" in refusal(path)
    assert time.process_time() - start < 3


@FORMATS
def test_a_tensor_that_is_the_negative_of_its_bytes_is_refused(
    tmp_path: Path, zipped: bool
) -> None:
    lazy = torch.randn(3, dtype=torch.complex64).conj()
    for tensor in (lazy, lazy.imag):
        assert "resolve_neg()" in refusal(save(tmp_path / "a.bin", {"x": tensor}, zipped=zipped))
    path = save(tmp_path / "a.bin", {"x": lazy.imag.resolve_neg()}, zipped=zipped)
    check_as_torch_reads_it(path, mmap=zipped)


def test_a_pickle_of_too_many_operations_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save(tmp_path / "a.bin", {f"x{i}": BASE[:i] for i in range(60)})
    monkeypatch.setattr("emp_llm.checkpoint.torch_save.pickle_reader._MAX_OPERATIONS", 500)
    assert "a pickle of more than 500 operations" in refusal(path)


def test_a_directory_that_is_too_large_is_refused_unread(tmp_path: Path) -> None:
    path = raw_zip(tmp_path / "a.bin", tensor_pickle(16, 0, (4,), (1,)))
    directory_bytes = 32 << 20
    tail = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, directory_bytes, 64, 0)
    asked = []

    def read(start: int, stop: int) -> bytes:
        asked.append(stop - start)
        content = path.read_bytes()[:64] + bytes(directory_bytes) + tail
        return content[start:stop]

    with pytest.raises(CheckpointError, match="a directory of 33,554,432 bytes"):
        read_torch_header_by(read, "a.bin", 64 + directory_bytes + len(tail))
    assert max(asked) < 1 << 20


@FORMATS
def test_a_file_that_is_cut_short_anywhere_is_refused(tmp_path: Path, zipped: bool) -> None:
    whole = save(tmp_path / "whole.bin", {"x": torch.arange(300)}, zipped=zipped).read_bytes()
    path = tmp_path / "a.bin"
    for size in (0, 1, 20, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refusal(path)


def test_archives_that_are_none_of_torch_save_say_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    cases = {
        "big-endian": repacked(save(path, {"x": BASE}), byteorder=b"big"),
    }
    assert "big-endian machine" in refusal(cases["big-endian"])
    torch.save({"x": BASE}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/constants.pkl", b"")
    assert "TorchScript" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "no weights")
    assert "but not of torch.save" in refusal(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", tensor_pickle(16, 0, (4,), (1,)))
    assert "compressed" in refusal(path)
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in refusal(path)
    path.write_bytes(b"\x93NUMPY")
    assert "is not a file of torch.save" in refusal(path)
    path.write_bytes(
        LEGACY_MAGIC + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": False}, 2)
    )
    assert "big-endian machine" in refusal(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([BASE], "holds a list, not a state dict"),
        (
            {"model": {"x": BASE}, "epoch": 3},
            "holds tensors under 'model', as a training checkpoint does: save",
        ),
        ({"x": BASE, "epoch": 3}, "holds a int as 'epoch'"),
        ({3: BASE}, "holds a tensor as 3"),
        ({"__metadata__": BASE}, "a name that safetensors cannot hold"),
        ({"x" * 2000: BASE}, "a name that safetensors cannot hold"),
        ({"\ud800": BASE}, "a tensor with an invalid name"),
        ({"x": BASE.to_sparse()}, "_rebuild_sparse_tensor as 'x'"),
        ({"x": torch.empty(2, device="meta")}, "_rebuild_meta_tensor_no_storage as 'x'"),
        ({"x": BASE.to(torch.complex128)}, "torch.ComplexDoubleStorage"),
    ],
)
def test_what_is_no_state_dict_of_dense_tensors_is_refused(
    tmp_path: Path, content: object, reason: str
) -> None:
    assert reason in refusal(save(tmp_path / "a.bin", content))
