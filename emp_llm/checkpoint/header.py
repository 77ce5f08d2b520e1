"""The header of a file of weights: the tensors that it holds, whatever its format."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from emp_llm.checkpoint.regular_file import open_regular
from emp_llm.errors import CheckpointError

__all__ = [
    "DOWNLOAD_AGAIN",
    "MAX_DIMENSIONS",
    "MAX_NAME",
    "METADATA_KEY",
    "Header",
    "ReadRange",
    "TensorEntry",
    "UnreadableError",
    "check_no_pointer",
    "open_ranges",
    "unreadable_named",
]

MAX_NAME: Final = 1024
"""Characters of the longest name of a tensor; those of transformers' models have less than 200."""

MAX_DIMENSIONS: Final = 64
"""The most dimensions of a tensor; torch has no more."""

METADATA_KEY: Final = "__metadata__"
"""What no tensor of a safetensors file can be called: the header's field for metadata."""

DOWNLOAD_AGAIN: Final = "the file is cut short or damaged: download it again"

ReadRange = Callable[[int, int], bytes]
"""Returns the bytes of a file from an offset up to another, or those of them that it has."""

_GIT_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file of weights.

    Attributes:
        name: The tensor's name, unique in its file.
        dtype: A key of `emp_llm.checkpoint.dtypes.ITEM_BITS`, such as ``BF16``.
        shape: Sizes, outermost first; ``()`` for a scalar.
        start: Offset of the first byte, from the beginning of the file.
        end: Offset behind the last byte, from the beginning of the file.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """What a file of weights says about itself.

    Attributes:
        metadata: The free-form strings under ``__metadata__``; empty where there are none.
        tensors: The tensors in the order of their data.
        data_start: Offset of the first byte of data, from the beginning of the file.
        file_size: Bytes of the whole file.
    """

    metadata: dict[str, str]
    tensors: tuple[TensorEntry, ...]
    data_start: int
    file_size: int


class UnreadableError(Exception):
    """Why a file cannot be read, before it is known which one: "is 3 bytes, too short"."""


@contextmanager
def unreadable_named(name: str) -> Iterator[None]:
    """Raise an `UnreadableError` as the CheckpointError that names the file."""
    try:
        yield
    except UnreadableError as error:
        raise CheckpointError(f"{name}: {error}") from error


@contextmanager
def open_ranges(path: Path) -> Iterator[tuple[ReadRange, int]]:
    """Open a file: a way to read any range of it, and its size in bytes.

    Raises:
        CheckpointError: If the file cannot be opened or read.
    """
    try:
        with open_regular(path) as file:

            def read(start: int, stop: int) -> bytes:
                file.seek(start)
                return file.read(stop - start)

            yield read, os.fstat(file.fileno()).st_size
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


def check_no_pointer(read: ReadRange) -> None:
    """Refuse the few lines of text that Git leaves in the place of a file kept by Git LFS.

    Raises:
        UnreadableError: If the file is one.
    """
    if read(0, len(_GIT_LFS_POINTER)) == _GIT_LFS_POINTER:
        raise UnreadableError("is a Git LFS pointer, not the weights: run `git lfs pull` there")
