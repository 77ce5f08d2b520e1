"""What a file that torch.save wrote holds, read like a header: which tensors, and where they lie.

Both kinds of file store tensors' bytes plainly, one run for each storage:

    zip        NAME/data.pkl (the pickle), NAME/data/KEY (a storage each), uncompressed
    legacy     before torch 1.6: magic number, version and system, the pickle, the list of keys, all
               pickled, and of each storage the number of its items in 8 bytes and then its bytes

A tensor may be a view of a storage with strides, and several may share one. So the header that is
made here is that of a file in which every tensor lies by itself and dense, and which
`emp_llm.checkpoint.torch_save.file` assembles as it is read; tensors that are the very same bytes
are so there, too.
"""

import io
import os
import struct
import zipfile
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, cast

from emp_llm.checkpoint.regular_file import open_regular
from emp_llm.checkpoint.safetensors_header import ITEM_BITS, Header, Read, TensorEntry
from emp_llm.checkpoint.torch_save.pickle_reader import (
    MAX_PICKLE_BYTES,
    PickleError,
    Storage,
    StoredTensor,
    read_pickle,
    tensors_of,
)
from emp_llm.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["locate_tensors", "read_torch_header", "read_torch_header_by"]

_MAX_DIRECTORY_BYTES = 16 << 20
_MAX_GROWTH = 8  # a file whose tensors are so many times its size is a bomb, not a checkpoint
_SMALL = 64 << 20
_LINE = 128
_FIRST_LOOK = 64 << 10
_ZIP = b"PK\x03\x04"
_LOCAL_HEADER = struct.Struct("<4s22xHH")
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_COUNT_BYTES = 8
_GIT_LFS_POINTER = b"version https://git-lfs"
_AGAIN = "the file is cut short or damaged: download it again"


class _Contents(NamedTuple):
    """The tensors of a file, and a way to find where a storage starts."""

    tensors: dict[str, StoredTensor]
    storage_start: Callable[[Storage], int]


def read_torch_header(path: Path) -> Header:
    """Read and check what a file of torch.save holds; see `read_torch_header_by`."""
    with _reading(path) as (read, size):
        return read_torch_header_by(read, path.name, size)


def read_torch_header_by(read: Read, name: str, file_size: int) -> Header:
    """Read and check what a file of torch.save holds, wherever it lies.

    No code that the file names is run or imported, and no data is read.

    Args:
        read: Returns the bytes of the file from an offset up to another, or those that it has.
        name: The file's name, for errors.
        file_size: Bytes of the whole file.

    Returns:
        The header of the file that `emp_llm.checkpoint.torch_save.file` gives, in the order of the
        state dict.
        `file_size` is that of the file itself.

    Raises:
        CheckpointError: If it is no whole file of torch.save, holds something else than a state
            dict of tensors that safetensors know, or names code.
    """
    with _naming(name):
        return _layout(_contents(read, file_size).tensors, file_size)[0]


def locate_tensors(path: Path) -> list[tuple[TensorEntry, StoredTensor, int]]:
    """Find where the tensors of a file of torch.save lie in it.

    Returns:
        Each tensor of the header, in its order, with how it is stored and the offset of its first
        item in the file.

    Raises:
        CheckpointError: As `read_torch_header_by` does, or if a storage is not where it should be.
    """
    with _reading(path) as (read, size), _naming(path.name):
        contents = _contents(read, size)
        header, stored = _layout(contents.tensors, size)
        starts = {
            storage.key: contents.storage_start(storage)
            for storage in _storages(contents.tensors).values()
        }
    return [
        (entry, tensor, starts[tensor.storage.key] + tensor.start)
        for entry, tensor in zip(header.tensors, stored, strict=True)
    ]


@contextmanager
def _reading(path: Path) -> "Iterator[tuple[Read, int]]":
    try:
        with open_regular(path) as file:

            def read(start: int, stop: int) -> bytes:
                file.seek(start)
                return file.read(stop - start)

            yield read, os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


@contextmanager
def _naming(name: str) -> "Iterator[None]":
    try:
        yield
    except PickleError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _layout(
    tensors: Mapping[str, StoredTensor], file_size: int
) -> tuple[Header, list[StoredTensor]]:
    """Give each tensor its place, the same bytes the same one; and the tensors in that order."""
    places: dict[StoredTensor, int] = {}
    entries = []
    end = 0
    for name, tensor in tensors.items():
        start = places.setdefault(tensor, end)
        entry = TensorEntry(name, tensor.dtype, tensor.shape, start, start + tensor.nbytes)
        end = max(end, entry.end)
        entries.append((entry, tensor))
    if end > _MAX_GROWTH * file_size + _SMALL:
        raise PickleError(
            f"has {file_size:,} bytes, its tensors {end:,}: this is no honest checkpoint; get "
            "the weights as safetensors from their makers"
        )
    entries.sort(key=lambda pair: (pair[0].start, pair[0].end))
    header = Header({"format": "pt"}, tuple(entry for entry, _ in entries), 0, file_size)
    return header, [tensor for _, tensor in entries]


def _contents(read: Read, file_size: int) -> _Contents:
    head = read(0, len(_GIT_LFS_POINTER))
    if head == _GIT_LFS_POINTER:
        raise PickleError("is a Git LFS pointer, not the weights: run `git lfs pull` there")
    if head.startswith(_ZIP):
        return _zip_contents(read, file_size)
    return _legacy_contents(read, file_size)


class _RangeFile:
    """A file whose bytes are had by range; no more than are there, or a directory's worth."""

    def __init__(self, read: Read, stop: int) -> None:
        self._read, self._stop, self._at = read, stop, 0

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._stop}[whence]
        if base + offset < 0:
            raise PickleError(f"has a damaged directory; {_AGAIN}")
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._stop - self._at)
        count = left if size < 0 else min(size, left)
        if count > max(_MAX_DIRECTORY_BYTES, MAX_PICKLE_BYTES):
            raise PickleError(f"has a directory of {count:,} bytes; {_AGAIN}")
        data = self._read(self._at, self._at + count)
        self._at += len(data)
        return data

    def readline(self) -> bytes:
        start, line = self._at, bytearray()
        while more := self.read(_LINE):
            stop = more.find(b"\n") + 1
            line += more[: stop or None]
            if stop:
                break
        self._at = start + len(line)
        return bytes(line)


def _zip_contents(read: Read, file_size: int) -> _Contents:
    archive, entries, prefix = _open_archive(read, file_size)
    if _small_entry(archive, entries.get(f"{prefix}byteorder")) == b"big":
        raise _big_endian()
    content = read_pickle(io.BytesIO(_small_entry(archive, entries[f"{prefix}data.pkl"])))
    tensors = tensors_of(content)
    for storage in _storages(tensors).values():
        info = entries.get(f"{prefix}data/{storage.key}")
        if info is None:
            raise PickleError(f"lacks the storage {storage.key:.40}; {_AGAIN}")
        _check_stored(info)
        if info.file_size < storage.nbytes:
            raise PickleError(
                f"has {info.file_size:,} bytes of storage {storage.key:.40}, which needs "
                f"{storage.nbytes:,}; {_AGAIN}"
            )

    def storage_start(storage: Storage) -> int:
        at = entries[f"{prefix}data/{storage.key}"].header_offset
        local = read(at, at + _LOCAL_HEADER.size)
        if len(local) < _LOCAL_HEADER.size or not local.startswith(_ZIP):
            raise PickleError(f"has no storage {storage.key:.40} at byte {at:,}; {_AGAIN}")
        _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(local)
        start: int = at + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if start + storage.nbytes > file_size:
            raise PickleError(f"ends within the storage {storage.key:.40}; {_AGAIN}")
        return start

    return _Contents(tensors, storage_start)


def _open_archive(
    read: Read, file_size: int
) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo], str]:
    """The archive, its files by name, and the folder that all of them are in."""
    try:
        archive = zipfile.ZipFile(cast("BinaryIO", _RangeFile(read, file_size)))
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise PickleError(f"is no whole zip archive ({error}); {_AGAIN}") from error
    entries = {info.filename: info for info in archive.infolist()}
    if len(entries) != len(archive.infolist()):
        raise PickleError(f"has two files of one name in it; {_AGAIN}")
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise PickleError("is a zip archive, but not one of torch.save: give the weights' own file")
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in entries:
        raise PickleError(
            "is a TorchScript archive, a program: save the model's state_dict() with torch.save"
        )
    return archive, entries, prefix


def _storages(tensors: Mapping[str, StoredTensor]) -> dict[str, Storage]:
    """The storages by key."""
    storages: dict[str, Storage] = {}
    for tensor in tensors.values():
        if storages.setdefault(tensor.storage.key, tensor.storage) != tensor.storage:
            raise PickleError(f"has two storages {tensor.storage.key:.40}; {_AGAIN}")
    return storages


def _check_stored(info: zipfile.ZipInfo) -> None:
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise PickleError(
            f"has {info.filename:.80} compressed or encrypted, which torch does not: "
            "load it with torch and save it again"
        )


def _small_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo | None) -> bytes:
    if info is None:
        return b""
    _check_stored(info)
    if info.file_size > MAX_PICKLE_BYTES:
        raise PickleError(
            f"has {info.filename:.80} of {info.file_size:,} bytes, over the limit of "
            f"{MAX_PICKLE_BYTES:,}: save it in several shards"
        )
    try:
        return archive.read(info)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, RuntimeError) as error:
        raise PickleError(f"has a damaged {info.filename:.80} ({error}); {_AGAIN}") from error


def _legacy_contents(read: Read, file_size: int) -> _Contents:
    head = _Head(read, min(file_size, MAX_PICKLE_BYTES))
    file = cast("BinaryIO", _RangeFile(head.read, head.size))
    if _legacy_magic(file) != _LEGACY_MAGIC:
        raise PickleError(f"is no file of torch.save; {_AGAIN}")
    read_pickle(file)  # the protocol's version, which never changed
    system = read_pickle(file)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise _big_endian()
    tensors = tensors_of(read_pickle(file))
    storages = _storages(tensors)
    starts = {}
    keys = _legacy_keys(read_pickle(file), storages)
    at = file.tell()
    for key in keys:
        starts[key] = at + _COUNT_BYTES
        at = starts[key] + storages[key].nbytes
    if at != file_size:
        raise PickleError(f"is {file_size:,} bytes, its tensors need {at:,}; {_AGAIN}")

    def storage_start(storage: Storage) -> int:
        start = starts[storage.key]
        items = int.from_bytes(read(start - _COUNT_BYTES, start), "little")
        if items * ITEM_BITS[storage.dtype or "U8"] // 8 != storage.nbytes:
            raise PickleError(f"has {items:,} items in storage {storage.key:.40}; {_AGAIN}")
        return start

    return _Contents(tensors, storage_start)


class _Head:
    """The beginning of a file, of which more is read as more is wanted."""

    def __init__(self, read: Read, size: int) -> None:
        self.size = size
        self._read, self._known = read, b""

    def read(self, start: int, stop: int) -> bytes:
        if stop > len(self._known):
            end = min(self.size, max(stop, 2 * len(self._known), _FIRST_LOOK))
            self._known += self._read(len(self._known), end)
        return self._known[start:stop]


def _legacy_magic(file: BinaryIO) -> object:
    try:
        return read_pickle(file)
    except PickleError:
        return None


def _legacy_keys(keys: object, storages: Mapping[str, Storage]) -> list[str]:
    """The keys of the storages, in their order in the file."""
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise PickleError(f"has no list of its storages; {_AGAIN}")
    if len(keys) != len(storages) or set(keys) != storages.keys():
        raise PickleError(f"has a list of storages that is not its tensors'; {_AGAIN}")
    return keys


def _big_endian() -> PickleError:
    return PickleError("was saved on a big-endian machine: load it there, save it as safetensors")
