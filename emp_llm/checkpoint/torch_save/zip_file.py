"""Files that torch.save wrote since torch 1.6: a zip archive, nothing in it compressed.

NAME/data.pkl    the pickle
NAME/data/KEY    the bytes of a storage each
NAME/byteorder   little or big
"""

import io
import struct
import zipfile
from typing import BinaryIO, Final, cast

from emp_llm.checkpoint.header import DOWNLOAD_AGAIN, ReadRange, UnreadableError
from emp_llm.checkpoint.torch_save.contents import Contents, big_endian, storages_of
from emp_llm.checkpoint.torch_save.pickle_reader import MAX_PICKLE_BYTES, read_pickle
from emp_llm.checkpoint.torch_save.pickled_tensors import Storage
from emp_llm.checkpoint.torch_save.range_file import RangeFile
from emp_llm.checkpoint.torch_save.state_dict import tensors_of

__all__ = ["ZIP_MAGIC", "zip_contents"]

ZIP_MAGIC: Final = b"PK\x03\x04"

_LOCAL_HEADER = struct.Struct("<4s22xHH")


def zip_contents(read: ReadRange, file_size: int) -> Contents:
    """What a file since torch 1.6 holds; only the archive's directory and the pickle are read.

    Args:
        read: Reads a range of the file.
        file_size: Bytes of the whole file.

    Raises:
        UnreadableError: If it is not such a file, is incomplete, or holds no state dict.
    """
    archive, entries, prefix = _open_archive(read, file_size)
    if _small_entry(archive, entries.get(f"{prefix}byteorder")) == b"big":
        raise big_endian()
    content = read_pickle(io.BytesIO(_small_entry(archive, entries[f"{prefix}data.pkl"])))
    tensors = tensors_of(content)
    for storage in storages_of(tensors).values():
        info = entries.get(f"{prefix}data/{storage.key}")
        if info is None:
            raise UnreadableError(f"lacks the storage {storage.key:.40}; {DOWNLOAD_AGAIN}")
        _check_stored(info)
        # the pickle is not to be believed: it may claim more bytes than there are
        if info.file_size < storage.nbytes:
            raise UnreadableError(
                f"has {info.file_size:,} bytes of storage {storage.key:.40}, which needs "
                f"{storage.nbytes:,}; {DOWNLOAD_AGAIN}"
            )

    def storage_start(storage: Storage) -> int:
        at = entries[f"{prefix}data/{storage.key}"].header_offset
        local = read(at, at + _LOCAL_HEADER.size)
        if len(local) < _LOCAL_HEADER.size or not local.startswith(ZIP_MAGIC):
            raise UnreadableError(
                f"has no storage {storage.key:.40} at byte {at:,}; {DOWNLOAD_AGAIN}"
            )
        # The archive's directory does not say where the data starts: torch pads the local header so
        # that each storage starts at a multiple of 64 bytes.
        _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(local)
        start: int = at + _LOCAL_HEADER.size + name_bytes + extra_bytes
        if start + storage.nbytes > file_size:
            raise UnreadableError(f"ends within the storage {storage.key:.40}; {DOWNLOAD_AGAIN}")
        return start

    return Contents(tensors, storage_start)


def _open_archive(
    read: ReadRange, file_size: int
) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo], str]:
    """The archive, its files by name, and the folder that all of them are in."""
    try:
        archive = zipfile.ZipFile(cast("BinaryIO", RangeFile(read, file_size)))
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise UnreadableError(f"is a damaged zip archive ({error}); {DOWNLOAD_AGAIN}") from error
    entries = {info.filename: info for info in archive.infolist()}
    if len(entries) != len(archive.infolist()):
        raise UnreadableError(f"has two files of one name in it; {DOWNLOAD_AGAIN}")
    pickles = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise UnreadableError(
            "is a zip archive, but not of torch.save: give the file that holds the weights"
        )
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}constants.pkl" in entries:
        raise UnreadableError(
            "is a TorchScript archive, a program: save the model's state_dict() with torch.save"
        )
    return archive, entries, prefix


def _check_stored(info: zipfile.ZipInfo) -> None:
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise UnreadableError(
            f"has {info.filename:.80} compressed or encrypted, which torch never does: "
            "load it with torch and save it again"
        )


def _small_entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo | None) -> bytes:
    if info is None:
        return b""
    _check_stored(info)
    if info.file_size > MAX_PICKLE_BYTES:
        raise UnreadableError(
            f"has {info.filename:.80} of {info.file_size:,} bytes, over the limit of "
            f"{MAX_PICKLE_BYTES:,}: save it in several shards"
        )
    try:
        return archive.read(info)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, ValueError, RuntimeError) as error:
        raise UnreadableError(
            f"has a damaged {info.filename:.80} ({error}); {DOWNLOAD_AGAIN}"
        ) from error
