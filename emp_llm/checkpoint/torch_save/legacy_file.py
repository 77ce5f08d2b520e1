"""Files that torch.save wrote before torch 1.6: pickles, and behind them the storages.

magic number, version, system, the state dict, the list of storages' keys    a pickle each
for each storage, the number of its items in 8 bytes, then its bytes
"""

from collections.abc import Mapping
from typing import BinaryIO, cast

from emp_llm.checkpoint.dtypes import item_bytes
from emp_llm.checkpoint.header import DOWNLOAD_AGAIN, ReadRange, UnreadableError
from emp_llm.checkpoint.torch_save.contents import Contents, big_endian, storages_of
from emp_llm.checkpoint.torch_save.pickle_reader import MAX_PICKLE_BYTES, read_pickle
from emp_llm.checkpoint.torch_save.pickled_tensors import Storage
from emp_llm.checkpoint.torch_save.range_file import RangeFile
from emp_llm.checkpoint.torch_save.state_dict import tensors_of

__all__ = ["legacy_contents"]

_MAGIC = 0x1950A86A20F9469CFC6C
_COUNT_BYTES = 8
_FIRST_LOOK = 64 << 10


def legacy_contents(read: ReadRange, file_size: int) -> Contents:
    """What a file before torch 1.6 holds; no more of it is read than its pickles.

    Args:
        read: Reads a range of the file.
        file_size: Bytes of the whole file.

    Raises:
        UnreadableError: If it is not such a file, is incomplete, or holds no state dict.
    """
    head = _Head(read, min(file_size, MAX_PICKLE_BYTES))
    file = cast("BinaryIO", RangeFile(head.read, head.size))
    if _legacy_magic(file) != _MAGIC:
        raise UnreadableError(f"is not a file of torch.save; {DOWNLOAD_AGAIN}")
    read_pickle(file)  # the protocol's version, which never changed
    system = read_pickle(file)
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise big_endian()
    tensors = tensors_of(read_pickle(file))
    storages = storages_of(tensors)
    starts = {}
    keys = _legacy_keys(read_pickle(file), storages)
    at = file.tell()
    for key in keys:
        starts[key] = at + _COUNT_BYTES
        at = starts[key] + storages[key].nbytes
    # each storage lies behind the one before, so the last ends where the file does
    if at != file_size:
        raise UnreadableError(f"is {file_size:,} bytes, its tensors need {at:,}; {DOWNLOAD_AGAIN}")

    def storage_start(storage: Storage) -> int:
        start = starts[storage.key]
        items = int.from_bytes(read(start - _COUNT_BYTES, start), "little")
        if items * item_bytes(storage.dtype or "U8") != storage.nbytes:
            raise UnreadableError(
                f"has {items:,} items in storage {storage.key:.40}; {DOWNLOAD_AGAIN}"
            )
        return start

    return Contents(tensors, storage_start)


class _Head:
    """The beginning of a file, of which more is read as it is needed.

    How long the pickles are is known only once they have been read. So that a file on the Hub is
    not asked for again and again, each read doubles what is there.
    """

    def __init__(self, read: ReadRange, size: int) -> None:
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
    except UnreadableError:
        return None


def _legacy_keys(keys: object, storages: Mapping[str, Storage]) -> list[str]:
    """The keys of the storages, in their order in the file."""
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise UnreadableError(f"has no list of its storages; {DOWNLOAD_AGAIN}")
    if len(keys) != len(storages) or set(keys) != storages.keys():
        raise UnreadableError(f"lists other storages than its tensors use; {DOWNLOAD_AGAIN}")
    return keys
