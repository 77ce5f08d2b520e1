"""Tensors that were not pruned, compared byte for byte with the source's.

ComparedBytes   one that is plain
ComparedWhole   one that is packed
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
from emp_kernels.numbers import FORMATS
from emp_kernels.rows import Bytes, Workspace

from emp_llm.checkpoint.dtypes import ITEM_BITS
from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.errors import FormatError
from emp_llm.runtime.pipeline import Piece
from emp_llm.tensors.bit_patterns import first_difference, in_words
from emp_llm.tensors.geometry import RowBlock
from emp_llm.tensors.row_reader import PlainReader, StoredRows, block_memory
from emp_llm.verification.tensor_checks import NOT_OF_SOURCE, BytesCheck, WholeCheck

__all__ = ["ComparedBytes", "ComparedWhole", "difference"]

_BYTE = 8
"""Bits."""


class ComparedBytes:
    """Checks a tensor of a written folder, and compares it with the source's.

    Args:
        check: The tensor in the folder.
        entry: Its place in the source, where it has the same dtype and shape.
        file: The source's file.
        source: What the source is called, for errors.
    """

    def __init__(
        self, check: BytesCheck, entry: TensorEntry, file: SourceFile, source: str
    ) -> None:
        self._check = check
        self._entry = entry
        self._file = file
        self._source = source

    def pieces(self) -> Iterator[Piece]:
        """The work, a stretch of bytes at a time."""
        for start, nbytes in self._check.stretches():
            yield Piece(nbytes, partial(self._compare, start, nbytes), self._settle)
        yield Piece.note(self._check.conclude)

    def _compare(
        self, start: int, nbytes: int, workspace: Workspace
    ) -> tuple[Bytes, FormatError | None]:
        """A stretch of the tensor, and how it differs from the source's."""
        found = self._check.read(start, nbytes, workspace)
        expected = workspace.take("stored", nbytes)[:nbytes]
        self._file.read_into(self._entry.start + start, expected.data)
        what = difference(found, expected, start, self._entry, self._source)
        return found, None if what is None else self._check.fault(what, NOT_OF_SOURCE)

    def _settle(self, compared: tuple[Bytes, FormatError | None]) -> None:
        """Take note of a stretch; in order, so that of several faults the first is raised."""
        data, fault = compared
        if fault is not None:
            raise fault
        self._check.take(data)


class ComparedWhole:
    """Checks a tensor that was packed without being pruned, and compares it with the source's.

    Args:
        check: The tensor in the folder.
        entry: Its place in the source, where it has the same dtype and shape.
        file: The source's file.
        source: What the source is called, for errors.
    """

    def __init__(
        self, check: WholeCheck, entry: TensorEntry, file: SourceFile, source: str
    ) -> None:
        self._check = check
        self._entry = entry
        self._reader = PlainReader(file, entry, check.geometry)
        self._source = source

    def pieces(self) -> Iterator[Piece]:
        """The work, row block by row block."""
        geometry = self._check.geometry
        for block in geometry.row_blocks():
            yield Piece(geometry.block_bytes(block), partial(self._compare, block), self._settle)
        yield Piece.note(self._check.conclude)

    def _compare(
        self, block: RowBlock, workspace: Workspace
    ) -> tuple[StoredRows, FormatError | None]:
        """A row block, and how it differs from the source's."""
        geometry = self._check.geometry
        memory = block_memory(geometry, block, workspace, "stored")
        found = self._check.read(block, workspace, memory)
        expected = self._reader.read(block, workspace).stored
        data = found.rows.reshape(-1).view(np.uint8)
        start = geometry.first_row(block) * geometry.row_bytes
        what = difference(data, expected, start, self._entry, self._source)
        return found, None if what is None else self._check.fault(what, NOT_OF_SOURCE)

    def _settle(self, compared: tuple[StoredRows, FormatError | None]) -> None:
        """Take note of a row block; in order, so that of several faults the first is raised."""
        rows, fault = compared
        if fault is not None:
            raise fault
        self._check.take(rows)


def difference(
    found: Bytes, expected: Bytes, start: int, entry: TensorEntry, source: str
) -> str | None:
    """How a stretch of a tensor's bytes, from `start` on, differs from the source's, in words."""
    at = first_difference(found.reshape(1, -1), expected.reshape(1, -1))
    if at is None:
        return None
    item = max(1, ITEM_BITS[entry.dtype] // _BYTE)
    first = at[1] - at[1] % item
    is_, must_be = (_item(data[first : first + item], entry.dtype) for data in (found, expected))
    return f"{_place((start + first) // item, entry)} is {is_}; in {source} it is {must_be}"


def _place(number: int, entry: TensorEntry) -> str:
    """What an item is called: by its indices, if several items do not share a byte."""
    if ITEM_BITS[entry.dtype] < _BYTE:
        return f"byte {number}"
    return f"item {[int(index) for index in np.unravel_index(number, entry.shape)]}"


def _item(data: Bytes, dtype: str) -> str:
    bits = int.from_bytes(data.tobytes(), "little")
    return in_words(bits, FORMATS[dtype]) if dtype in FORMATS else f"0x{bits:0{len(data) * 2}x}"
