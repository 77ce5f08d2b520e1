"""A packed tensor opened for reading: its row table checked, its rows decoded by row blocks."""

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
from emp_llm.tensors.packed import MAX_META_BYTES, PackedTensor
from emp_llm.tensors.packed_config import KNOWN_VERSIONS, WHOLE_VERSION
from emp_llm.tensors.planes import Planes, find_packed
from emp_llm.tensors.planes_reader import PlanesReader
from emp_llm.tensors.row_reader import StoredRows, block_memory
from emp_llm.tensors.whole import MAX_WHOLE_META_BYTES, WholeTensor
from emp_llm.tensors.whole_reader import WholeReader

if TYPE_CHECKING:
    import torch
    from emp_kernels.gpu_workspace import DeviceWorkspace

__all__ = ["PackedReader", "open_packed", "open_shard"]

# Rows that keep one weight each grow 16 times at most: their masks alone are a sixteenth of 16-bit
# weights. Only rows of zeros have no mask.
_MOST_GROWTH = 32
_SMALL = 64 << 20
_TABLE_ROWS = 1 << 16  # lines of a row table that are checked at a time


class PackedReader(PlanesReader):
    """Reads one packed tensor that was pruned.

    Args:
        file: Its file.
        planes: Where its planes lie.
        packed: What `NAME.emp_meta` says of the tensor.

    Attributes:
        kept: How many weights all its rows keep.

    Raises:
        CheckpointError: If the file cannot be read.
        FormatError: If the planes contradict each other.
    """

    def __init__(self, file: SourceFile, planes: Planes, packed: PackedTensor) -> None:
        self.packed = packed
        self.kept = 0
        super().__init__(file, planes, packed.table_bytes, packed.geometry.rows * packed.line_bytes)

    @property
    def geometry(self) -> Geometry:
        """The shape of the dense tensor, and how its rows run."""
        return self.packed.geometry

    def encode_meta(self) -> bytes:
        """The bytes of its parameters."""
        return self.packed.encode_meta()

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
        table = self._table(first, first + block.stop - block.start)
        return self.stored_block(block, workspace), table

    def _find_starts(self) -> list[int]:
        """Check the row table and count what is kept; see `PlanesReader`."""
        geometry, layout = self.geometry, self.packed.layout
        firsts = np.array([geometry.first_row(block) for block in geometry.row_blocks()])
        end, starts = 0, []
        for first in range(0, geometry.rows, _TABLE_ROWS):
            stop = min(first + _TABLE_ROWS, geometry.rows)
            table = self._table(first, stop)
            try:
                check_table(table, layout)
            except DamagedRowError as error:
                raise self.damage(f"row {first + error.row}: {error.fault}") from error
            self.kept += int(table[:, 0].sum())
            offsets = end + layout.offsets(table[:, 0], table[:, 1])
            here = firsts[(firsts >= first) & (firsts < stop)]
            starts.extend(offsets[here - first].tolist())
            end = int(offsets[-1])
        return [*starts, end]

    def _table(self, first: int, stop: int) -> Table:
        """Lines of the row table, int64 [stop - first, 3]."""
        return self.packed.decode_table(self.table_lines(first, stop, self.packed.line_bytes))

    def _damaged_row(self, block: RowBlock, error: DamagedRowError) -> FormatError:
        return self.damage(f"row {self.geometry.first_row(block) + error.row}: {error.fault}")


def open_packed(file: SourceFile, planes: Planes) -> PackedReader | WholeReader:
    """Open a packed tensor, of whichever version of the format.

    Raises:
        CheckpointError: If the file cannot be read.
        FormatError: If the tensor is damaged, or of a version that this release does not know.
    """
    name, meta = planes.records.name, planes.meta
    longest = max(MAX_META_BYTES, MAX_WHOLE_META_BYTES) + 8
    data = bytearray(min(meta.nbytes, longest))
    file.read_into(meta.start, memoryview(data))
    version = int.from_bytes(data[:8], "little", signed=True)
    if version not in KNOWN_VERSIONS:
        raise FormatError(
            f"{file.name}: {name!r} is packed in version {version} of the format; this emp-llm "
            f"reads versions {KNOWN_VERSIONS[0]} to {KNOWN_VERSIONS[-1]}: install a release that "
            "knows it"
        )
    try:
        if version != WHOLE_VERSION:
            packed = PackedTensor.decode_meta(name, bytes(data))
        else:
            whole = WholeTensor.decode_meta(name, bytes(data))
    except FormatError as error:
        raise FormatError(f"{file.name}: {error}") from error
    if version != WHOLE_VERSION:
        return PackedReader(file, planes, packed)
    return WholeReader(file, planes, whole)


def open_shard(
    shard: Shard, file: SourceFile
) -> tuple[dict[str, PackedReader | WholeReader], list[TensorEntry]]:
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
    readers = {name: open_packed(file, planes) for name, planes in packed.items()}
    stored = sum(reader.nbytes for reader in readers.values())
    dense = sum(reader.geometry.nbytes for reader in readers.values())
    if dense > _MOST_GROWTH * stored + _SMALL:
        raise FormatError(
            f"{shard.name}: its packed tensors have {stored:,} bytes and would have {dense:,} "
            "unpacked: this is not a valid checkpoint; prune or pack it again"
        )
    return readers, plain
