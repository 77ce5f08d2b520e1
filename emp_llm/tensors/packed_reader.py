"""A packed tensor opened for reading: its row table checked, its rows decoded by row blocks.

What stays in memory is where the records of each row block start: a few bytes for some megabytes.
"""

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from emp_kernels.checks import check_table
from emp_kernels.dispatch import unpack_rows
from emp_kernels.errors import DamagedRowError
from emp_kernels.rows import Bytes, Patterns, Table, Workspace

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.shard import Shard
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.errors import FormatError
from emp_llm.tensors.geometry import Geometry, RowBlock
from emp_llm.tensors.packed import MAX_META_BYTES, PackedTensor, padding
from emp_llm.tensors.planes import Planes, find_packed
from emp_llm.tensors.row_reader import StoredRows, block_memory

if TYPE_CHECKING:
    import torch
    from emp_kernels.gpu_workspace import DeviceWorkspace

__all__ = ["PackedReader", "open_shard"]

# Rows that keep one weight each grow 16 times at most: their masks alone are a sixteenth of 16-bit
# weights. Only rows of zeros have no mask.
_MOST_GROWTH = 32
_SMALL = 64 << 20
_TABLE_ROWS = 1 << 16  # lines of a row table that are checked at a time


class PackedReader:
    """Reads one packed tensor.

    Args:
        file: Its file.
        planes: Where its planes lie.

    Attributes:
        planes: Where its planes lie.
        packed: What `NAME.emp_meta` says of the tensor.
        kept: How many weights all its rows keep.

    Raises:
        CheckpointError: If the file cannot be read.
        FormatError: If the planes contradict each other or are of another version.
    """

    def __init__(self, file: SourceFile, planes: Planes) -> None:
        self.planes = planes
        self._file = file
        self.packed = self._read_meta()
        if planes.rows.nbytes != self.packed.table_bytes:
            raise self._damage(
                f"its row table has {planes.rows.nbytes:,} bytes, its shape "
                f"{list(self.geometry.shape)} needs {self.packed.table_bytes:,}"
            )
        self.kept, self._starts = self._read_table()
        used = self._starts[-1]
        if planes.records.nbytes != used + len(padding(used)):
            raise self._damage(
                f"its records have {planes.records.nbytes:,} bytes, its row table describes "
                f"{used:,}"
            )
        # nothing may hide in the padding: the same weights have the same bytes and checksums
        for plane, end in ((planes.records, used), (planes.rows, self._table_end)):
            if any(self._read(plane.start + end, plane.nbytes - end)):
                raise self._damage(f"the padding of {plane.name!r} is not zero")

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.planes.records.name

    @property
    def geometry(self) -> Geometry:
        """The shape of the dense tensor, and how its rows run."""
        return self.packed.geometry

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

    def kept_rows(self, block: RowBlock) -> npt.NDArray[np.int64]:
        """How many weights each row of a row block keeps, int64 [rows]."""
        first = self.geometry.first_row(block)
        return self._table(first, first + block.stop - block.start)[:, 0]

    def read(
        self, block: RowBlock, workspace: Workspace, memory: Patterns | None = None
    ) -> StoredRows:
        """Read and unpack a row block, one of the geometry's; see `RowReader`.

        Raises:
            CheckpointError: If it cannot be read.
            FormatError: If a row contradicts itself or the table.
        """
        records, table = self._stored(block, workspace)
        out = block_memory(self.geometry, block, workspace) if memory is None else memory
        try:
            rows = unpack_rows(records, table, self.packed.layout, out=out, workspace=workspace)
        except DamagedRowError as error:
            raise self._damaged_row(block, error) from error
        return StoredRows(records, rows)

    def read_there(
        self, block: RowBlock, workspace: "DeviceWorkspace", out: "torch.Tensor"
    ) -> None:
        """Read a row block, one of the geometry's, and unpack it on a GPU.

        Args:
            block: Which rows.
            workspace: The GPU's workspace.
            out: int16 or int32 [rows, columns] on the GPU, of any strides; written.

        Raises:
            CheckpointError: If it cannot be read.
            FormatError: If a row contradicts itself or the table.
        """
        from emp_kernels.gpu_tensors import unpack_there

        records, table = self._stored(block, workspace)
        try:
            unpack_there(records, table, self.packed.layout, out, workspace=workspace)
        except DamagedRowError as error:
            raise self._damaged_row(block, error) from error

    def _stored(self, block: RowBlock, workspace: Workspace) -> tuple[Bytes, Table]:
        """The records of a row block, and its lines of the row table."""
        first = self.geometry.first_row(block)
        return self._records(block, workspace), self._table(first, first + block.stop - block.start)

    def _records(self, block: RowBlock, workspace: Workspace) -> Bytes:
        nbytes = self.block_bytes(block)
        data = workspace.take("records", nbytes)[:nbytes]
        at = self.planes.records.start + self._starts[self.geometry.block_number(block)]
        self._file.read_into(at, data.data)
        return data

    def _read_meta(self) -> PackedTensor:
        meta = self.planes.meta
        data = self._read(meta.start, min(meta.nbytes, MAX_META_BYTES + 8))
        try:
            return PackedTensor.decode_meta(self.name, data)
        except FormatError as error:
            raise FormatError(f"{self._file.name}: {error}") from error

    def _read_table(self) -> tuple[int, list[int]]:
        """Check the row table.

        Returns:
            How many weights are kept, and where the records of each row block start, as offsets
            in the plane of records; last, where they end.
        """
        geometry, layout = self.geometry, self.packed.layout
        firsts = np.array([geometry.first_row(block) for block in geometry.row_blocks()])
        kept, end, starts = 0, 0, []
        for first in range(0, geometry.rows, _TABLE_ROWS):
            stop = min(first + _TABLE_ROWS, geometry.rows)
            table = self._table(first, stop)
            try:
                check_table(table, layout)
            except DamagedRowError as error:
                raise self._damage(f"row {first + error.row}: {error.fault}") from error
            kept += int(table[:, 0].sum())
            offsets = end + layout.offsets(table[:, 0], table[:, 1])
            here = firsts[(firsts >= first) & (firsts < stop)]
            starts.extend(offsets[here - first].tolist())
            end = int(offsets[-1])
        return kept, [*starts, end]

    def _table(self, first: int, stop: int) -> Table:
        """Lines of the row table, int64 [stop - first, 3].

        They are read whenever they are needed: those of a whole model would take much memory.
        """
        line = self.packed.line_bytes
        data = np.empty((stop - first) * line, np.uint8)
        self._file.read_into(self.planes.rows.start + first * line, data.data)
        return self.packed.decode_table(data)

    @property
    def _table_end(self) -> int:
        return self.geometry.rows * self.packed.line_bytes

    def _plane(self, entry: TensorEntry) -> bytes:
        return self._read(entry.start, entry.nbytes)

    def _read(self, at: int, nbytes: int) -> bytes:
        data = bytearray(nbytes)
        self._file.read_into(at, memoryview(data))
        return bytes(data)

    def _damaged_row(self, block: RowBlock, error: DamagedRowError) -> FormatError:
        return self._damage(f"row {self.geometry.first_row(block) + error.row}: {error.fault}")

    def _damage(self, fault: str) -> FormatError:
        return FormatError(
            f"{self._file.name}: packed tensor {self.name!r} is damaged: {fault}; "
            "download or prune it again"
        )


def open_shard(shard: Shard, file: SourceFile) -> tuple[dict[str, PackedReader], list[TensorEntry]]:
    """Open all packed tensors of a shard.

    Args:
        shard: A shard of a packed checkpoint.
        file: Its file.

    Returns:
        A reader of each packed tensor by name, and the plain tensors, both in the order of their
        data.

    Raises:
        CheckpointError: If the file cannot be read.
        FormatError: If a packed tensor is damaged, incomplete or of another version.
    """
    packed, plain = find_packed(shard.name, shard.header.tensors)
    readers = {name: PackedReader(file, planes) for name, planes in packed.items()}
    stored = sum(reader.nbytes for reader in readers.values())
    dense = sum(reader.geometry.nbytes for reader in readers.values())
    if dense > _MOST_GROWTH * stored + _SMALL:
        raise FormatError(
            f"{shard.name}: its packed tensors have {stored:,} bytes and would have {dense:,} "
            "unpacked: this is not a valid checkpoint; prune it again"
        )
    return readers, plain
