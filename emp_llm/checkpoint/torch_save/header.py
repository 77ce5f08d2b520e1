"""The header of a file that torch.save wrote: which tensors it holds, and where they lie.

Both kinds of file store the bytes of tensors uncompressed, in one run for each storage (`zip_file`,
`legacy_file`). A tensor may be a view of a storage with strides, and several may share one storage.
So the header made here describes a file that does not exist on disk, in which each tensor lies by
itself, dense; `emp_llm.checkpoint.torch_save.file` assembles its bytes as they are read. Tensors
that are the very same bytes in the real file have the same place in that one too.
"""

from collections.abc import Mapping
from pathlib import Path

from emp_llm.checkpoint.header import (
    Header,
    ReadRange,
    TensorEntry,
    UnreadableError,
    check_no_pointer,
    open_ranges,
    unreadable_named,
)
from emp_llm.checkpoint.torch_save.contents import Contents, storages_of
from emp_llm.checkpoint.torch_save.legacy_file import legacy_contents
from emp_llm.checkpoint.torch_save.pickled_tensors import StoredTensor
from emp_llm.checkpoint.torch_save.zip_file import ZIP_MAGIC, zip_contents

__all__ = ["locate_tensors", "read_torch_header", "read_torch_header_by"]

_MAX_GROWTH = 8  # a file whose tensors are so many times its size is a bomb, not a checkpoint
_SMALL = 64 << 20


def read_torch_header(path: Path) -> Header:
    """Read and check what a file of torch.save holds; see `read_torch_header_by`."""
    with open_ranges(path) as (read, size):
        return read_torch_header_by(read, path.name, size)


def read_torch_header_by(read: ReadRange, name: str, file_size: int) -> Header:
    """Read and check what a file of torch.save holds, wherever it lies.

    No code that the file names is run or imported, and no data is read.

    Args:
        read: Returns the bytes of the file from an offset up to another, or those that it has.
        name: The file's name, for errors.
        file_size: Bytes of the whole file.

    Returns:
        The header of the file that `emp_llm.checkpoint.torch_save.file` assembles, its tensors in
        the order of the state dict. Its `file_size` is that of the real file.

    Raises:
        CheckpointError: If it is not a whole file of torch.save, holds something else than a state
            dict of tensors that safetensors know, or names code.
    """
    with unreadable_named(name):
        return _layout(_contents(read, file_size).tensors, file_size)[0]


def locate_tensors(path: Path) -> list[tuple[TensorEntry, StoredTensor, int]]:
    """Find where the tensors of a file of torch.save lie in it.

    Returns:
        Each tensor of the header, in its order, with how it is stored and the offset of its first
        item in the file.

    Raises:
        CheckpointError: As `read_torch_header_by` does, or if a storage is not where it should be.
    """
    with open_ranges(path) as (read, size), unreadable_named(path.name):
        contents = _contents(read, size)
        header, stored = _layout(contents.tensors, size)
        starts = {
            storage.key: contents.storage_start(storage)
            for storage in storages_of(contents.tensors).values()
        }
    return [
        (entry, tensor, starts[tensor.storage.key] + tensor.start)
        for entry, tensor in zip(header.tensors, stored, strict=True)
    ]


def _layout(
    tensors: Mapping[str, StoredTensor], file_size: int
) -> tuple[Header, list[StoredTensor]]:
    """Give each tensor its place, the same bytes the same one; and the tensors in that order."""
    places: dict[StoredTensor, int] = {}
    entries = []
    end = 0
    for name, tensor in tensors.items():
        # tied tensors are the same bytes of one storage, and are read and written as such
        start = places.setdefault(tensor, end)
        entry = TensorEntry(name, tensor.dtype, tensor.shape, start, start + tensor.nbytes)
        end = max(end, entry.end)
        entries.append((entry, tensor))
    if end > _MAX_GROWTH * file_size + _SMALL:
        raise UnreadableError(
            f"is {file_size:,} bytes and claims {end:,} bytes of tensors, which is too many; get "
            "the weights as safetensors from their makers"
        )
    entries.sort(key=lambda pair: (pair[0].start, pair[0].end))
    header = Header({"format": "pt"}, tuple(entry for entry, _ in entries), 0, file_size)
    return header, [tensor for _, tensor in entries]


def _contents(read: ReadRange, file_size: int) -> Contents:
    check_no_pointer(read)
    is_zip = read(0, len(ZIP_MAGIC)) == ZIP_MAGIC
    return (zip_contents if is_zip else legacy_contents)(read, file_size)
