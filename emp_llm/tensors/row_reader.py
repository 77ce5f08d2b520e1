"""The rows of a stored tensor, block by block, whichever way it is stored."""

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from emp_kernels.rows import Bytes, Patterns, Workspace

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.tensors.geometry import Geometry, RowBlock

__all__ = ["PlainReader", "RowReader", "StoredRows", "block_memory"]


class StoredRows(NamedTuple):
    """A block of rows.

    Attributes:
        stored: uint8 [bytes], what is stored of it; of a transposed tensor, its rows in order.
        rows: uint16 or uint32 [rows, columns], its weights' bit patterns.
    """

    stored: Bytes
    rows: Patterns


class RowReader(Protocol):
    """A tensor that is open for reading, by any thread."""

    @property
    def name(self) -> str:
        """The tensor's name."""

    @property
    def geometry(self) -> Geometry:
        """How its rows run."""

    @property
    def nbytes(self) -> int:
        """Bytes that are stored of it."""

    @property
    def end_bytes(self) -> bytes:
        """What is stored of it behind the last block."""

    def block_bytes(self, block: RowBlock) -> int:
        """Bytes that are stored of a block."""

    def kept_rows(self, block: RowBlock) -> npt.NDArray[np.int64] | None:
        """How many weights each row of a block keeps, int64 [R]; None where that is not stored."""

    def read(
        self, block: RowBlock, workspace: Workspace, memory: Patterns | None = None
    ) -> StoredRows:
        """Read a block.

        Args:
            block: Which rows.
            workspace: Buffers to use again; the result may lie in them.
            memory: Room for the rows, [rows, columns], C-contiguous, where they will lie; in the
                workspace if None.

        Raises:
            CheckpointError: If it cannot be read.
            FormatError: If it is damaged.
        """


def block_memory(
    geometry: Geometry, block: RowBlock, workspace: Workspace, name: str = "weights"
) -> Patterns:
    """Room in a workspace for a block's rows, [rows, columns]."""
    nbytes = geometry.block_bytes(block)
    buffer = workspace.take(name, nbytes)[:nbytes]
    return buffer.view(geometry.number_format.storage).reshape(-1, geometry.columns)


class PlainReader:
    """Reads a tensor that is stored weight by weight.

    Args:
        file: Its file.
        entry: Its place there.
        geometry: How its rows run.
    """

    end_bytes = b""

    def __init__(self, file: SourceFile, entry: TensorEntry, geometry: Geometry) -> None:
        self.geometry = geometry
        self._file = file
        self._entry = entry

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self._entry.name

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return self._entry.nbytes

    def block_bytes(self, block: RowBlock) -> int:
        """Bytes of a block's weights."""
        return self.geometry.block_bytes(block)

    def kept_rows(self, block: RowBlock) -> None:
        """Nothing tells a zero that is kept from one that is not."""

    def read(
        self, block: RowBlock, workspace: Workspace, memory: Patterns | None = None
    ) -> StoredRows:
        """Read a block."""
        if memory is None:
            memory = block_memory(self.geometry, block, workspace)
        self.geometry.read(self._file, self._entry.start, block, memory, workspace)
        return StoredRows(memory.reshape(-1).view(np.uint8), memory)
