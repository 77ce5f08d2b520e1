"""What readers of packed tensors have in common: the planes, and where each row block starts.

What stays in memory is where the records of each row block start: a few bytes for some megabytes.
"""

from abc import ABC, abstractmethod

import numpy as np
from emp_kernels.rows import Bytes, Workspace

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.errors import FormatError
from emp_llm.tensors.geometry import Geometry, RowBlock
from emp_llm.tensors.packed import padding
from emp_llm.tensors.planes import Planes

__all__ = ["PlanesReader"]


class PlanesReader(ABC):
    """The planes of one packed tensor, checked.

    Args:
        file: The file that holds them.
        planes: Where they lie.
        table_bytes: Bytes that the row table must have.
        table_end: How many of them are used.

    Attributes:
        planes: Where the planes lie.

    Raises:
        CheckpointError: If the file cannot be read.
        FormatError: If the planes contradict each other.
    """

    def __init__(self, file: SourceFile, planes: Planes, table_bytes: int, table_end: int) -> None:
        self.planes = planes
        self._file = file
        if planes.rows.nbytes != table_bytes:
            raise self.damage(
                f"its row table has {planes.rows.nbytes:,} bytes, its shape "
                f"{list(self.geometry.shape)} needs {table_bytes:,}"
            )
        self._starts = self._find_starts()
        used = self._starts[-1]
        if planes.records.nbytes != used + len(padding(used)):
            raise self.damage(
                f"its records have {planes.records.nbytes:,} bytes, its row table describes "
                f"{used:,}"
            )
        # nothing may hide in the padding: the same weights have the same bytes and checksums
        for plane, end in ((planes.records, used), (planes.rows, table_end)):
            if any(self._read(plane.start + end, plane.nbytes - end)):
                raise self.damage(f"the padding of {plane.name!r} is not zero")

    @property
    @abstractmethod
    def geometry(self) -> Geometry:
        """The shape of the dense tensor, and how its rows run."""

    @abstractmethod
    def _find_starts(self) -> list[int]:
        """Check the row table; returns where the records of each row block start, and they end."""

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.planes.records.name

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        return self.planes.nbytes

    @property
    def dense_entry(self) -> TensorEntry:
        """The tensor's entry in a dense file that begins with it."""
        geometry = self.geometry
        return TensorEntry(
            self.name, geometry.number_format.name, geometry.shape, 0, geometry.nbytes
        )

    @property
    def end_bytes(self) -> bytes:
        """What is stored behind the last record: padding, row table and parameters."""
        planes, used = self.planes, self._starts[-1]
        padding = self._read(planes.records.start + used, planes.records.nbytes - used)
        return padding + self._plane(planes.rows) + self._plane(planes.meta)

    def block_bytes(self, block: RowBlock) -> int:
        """Bytes of a row block's records."""
        number = self.geometry.block_number(block)
        return self._starts[number + 1] - self._starts[number]

    def stored_block(self, block: RowBlock, workspace: Workspace) -> Bytes:
        """The records of a row block, in the workspace."""
        nbytes = self.block_bytes(block)
        data = workspace.take("records", nbytes)[:nbytes]
        at = self.planes.records.start + self._starts[self.geometry.block_number(block)]
        self._file.read_into(at, data.data)
        return data

    def read_planes(self, buffer: Bytes) -> None:
        """Read records, row table and parameters, one after the other.

        Args:
            buffer: uint8 [`nbytes`]; written.

        Raises:
            CheckpointError: If the file cannot be read.
        """
        at = 0
        for plane in (self.planes.records, self.planes.rows, self.planes.meta):
            self._file.read_into(plane.start, buffer[at : at + plane.nbytes].data)
            at += plane.nbytes

    def table_lines(self, first: int, stop: int, line_bytes: int) -> Bytes:
        """The bytes of some lines of the row table.

        They are read whenever they are needed: those of a whole model would take much memory.
        """
        data = np.empty((stop - first) * line_bytes, np.uint8)
        self._file.read_into(self.planes.rows.start + first * line_bytes, data.data)
        return data

    def damage(self, fault: str) -> FormatError:
        """The error for a damaged tensor."""
        return FormatError(
            f"{self._file.name}: packed tensor {self.name!r} is damaged: {fault}; "
            "download, prune or pack it again"
        )

    def _plane(self, entry: TensorEntry) -> bytes:
        return self._read(entry.start, entry.nbytes)

    def _read(self, at: int, nbytes: int) -> bytes:
        data = bytearray(nbytes)
        self._file.read_into(at, memoryview(data))
        return bytes(data)
