"""The rows of a stored tensor, packed or plain, one row block at a time."""

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from emp_kernels.rows import Bytes, Patterns, Workspace

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.tensors.geometry import Geometry, RowBlock

__all__ = ["PlainReader", "RowReader", "StoredRows", "block_memory"]


class StoredRows(NamedTuple):
    """The rows of a row block.

    Attributes:
        stored: uint8 [bytes], what is stored of them: records, or the weights in row order.
        rows: uint16 or uint32 [rows, columns], the bit patterns of their weights.
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
        """What is stored of it behind the last row block."""

    def block_bytes(self, block: RowBlock) -> int:
        """Bytes that are stored of a row block."""

    def kept_rows(self, block: RowBlock) -> npt.NDArray[np.int64] | None:
        """How many weights each row of a row block keeps, int64 [rows]; None if not stored."""

    def read(
        self, block: RowBlock, workspace: Workspace, memory: Patterns | None = None
    ) -> StoredRows:
        """Read a row block.

        Args:
            block: Which rows.
            workspace: Buffers to use again; the result may lie in them.
            memory: Where to put the rows, [rows, columns], C-contiguous; in the workspace if
                None.

        Raises:
            CheckpointError: If it cannot be read.
            FormatError: If it is damaged.
        """


def block_memory(
    geometry: Geometry, block: RowBlock, workspace: Workspace, name: str = "weights"
) -> Patterns:
    """Memory in a workspace for the rows of a row block, uint16 or uint32 [rows, columns].

    Args:
        geometry: How the tensor's rows run.
        block: Which rows.
        workspace: Where the memory is taken from.
        name: The buffer's name there; what is taken by the same name again overwrites it.
    """
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
        """Bytes of a row block's weights."""
        return self.geometry.block_bytes(block)

    def kept_rows(self, block: RowBlock) -> None:
        """Unknown: a zero that was kept looks like one that was not."""

    def read(
        self, block: RowBlock, workspace: Workspace, memory: Patterns | None = None
    ) -> StoredRows:
        """Read a row block."""
        if memory is None:
            memory = block_memory(self.geometry, block, workspace)
        self.geometry.read(self._file, self._entry.start, block, memory, workspace)
        return StoredRows(memory.reshape(-1).view(np.uint8), memory)
