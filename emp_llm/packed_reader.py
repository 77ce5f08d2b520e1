"""A packed tensor opened for reading: its table in memory, its rows decoded block by block."""

from emp_kernels.dispatch import Workspace, check_table, unpack_rows
from emp_kernels.errors import DamagedRowError
from emp_kernels.rows import Bytes, Patterns

from emp_llm.checkpoint import Shard
from emp_llm.errors import FormatError
from emp_llm.geometry import Block, Geometry
from emp_llm.packed import PackedTensor, Planes, find_packed, padding
from emp_llm.safetensors_header import TensorEntry
from emp_llm.source_file import SourceFile

__all__ = ["PackedReader", "open_shard"]


class PackedReader:
    """Reads one packed tensor.

    Args:
        file: Its file.
        planes: Where its planes lie.

    Raises:
        CheckpointError: If the file cannot be read.
        FormatError: If the planes contradict each other or are of another version.
    """

    def __init__(self, file: SourceFile, planes: Planes) -> None:
        self.planes = planes
        self._file = file
        self.meta_bytes = self._plane(planes.meta)
        try:
            self.packed = PackedTensor.decode_meta(self.name, self.meta_bytes)
        except FormatError as error:
            raise FormatError(f"{file.name}: {error}") from error
        if planes.rows.nbytes != self.packed.table_bytes:
            raise self._damage(
                f"its row table has {planes.rows.nbytes:,} bytes, its shape "
                f"{list(self.geometry.shape)} needs {self.packed.table_bytes:,}"
            )
        self.table_bytes = self._plane(planes.rows)
        self.table = self.packed.decode_table(self.table_bytes)
        try:
            check_table(self.table, self.packed.layout)
        except DamagedRowError as error:
            raise self._damage(str(error)) from error
        self._offsets = self.packed.layout.offsets(self.table[:, 0], self.table[:, 1])
        used = int(self._offsets[-1])
        if planes.records.nbytes != used + len(padding(used)):
            raise self._damage(
                f"its records have {planes.records.nbytes:,} bytes, its row table tells of {used:,}"
            )

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.planes.records.name

    @property
    def geometry(self) -> Geometry:
        """The tensor that is packed."""
        return self.packed.geometry

    @property
    def dense_entry(self) -> TensorEntry:
        """The tensor as it is in a dense file, from offset 0."""
        geometry = self.geometry
        return TensorEntry(
            self.name, geometry.number_format.name, geometry.shape, 0, geometry.nbytes
        )

    @property
    def end_bytes(self) -> bytes:
        """What comes behind the last record: padding, table and meta."""
        used = int(self._offsets[-1])
        at = self.planes.records.start + used
        return (
            self._read(at, self.planes.records.nbytes - used) + self.table_bytes + self.meta_bytes
        )

    def records(self, block: Block, workspace: Workspace) -> Bytes:
        """The bytes of a block's records, uint8; they lie in the workspace."""
        nbytes = self.block_bytes(block)
        data = workspace.take("records", nbytes)[:nbytes]
        at = self.planes.records.start + int(self._offsets[self._row_range(block)[0]])
        self._file.read_into(at, data.data)
        return data

    def block_bytes(self, block: Block) -> int:
        """Bytes of a block's records."""
        first, stop = self._row_range(block)
        return int(self._offsets[stop] - self._offsets[first])

    def decode(
        self, block: Block, records: Bytes, workspace: Workspace, *, out: Patterns | None = None
    ) -> Patterns:
        """The weights of a block, bit patterns [rows, columns].

        Args:
            block: Which rows.
            records: Their records.
            workspace: Buffers to use again.
            out: Where to write them, C-contiguous; in the workspace if None.

        Raises:
            FormatError: If a row contradicts itself or the table.
        """
        first, stop = self._row_range(block)
        geometry = self.geometry
        if out is None:
            nbytes = geometry.block_bytes(block)
            buffer = workspace.take("weights", nbytes)[:nbytes]
            out = buffer.view(geometry.number_format.storage).reshape(-1, geometry.columns)
        try:
            return unpack_rows(
                records, self.table[first:stop], self.packed.layout, out=out, workspace=workspace
            )
        except DamagedRowError as error:
            raise self._damage(f"row {first + error.row}: {error.fault}") from error

    def _row_range(self, block: Block) -> tuple[int, int]:
        first = self.geometry.first_row(block)
        return first, first + block.stop - block.start

    def _plane(self, entry: TensorEntry) -> bytes:
        return self._read(entry.start, entry.nbytes)

    def _read(self, at: int, nbytes: int) -> bytes:
        data = bytearray(nbytes)
        self._file.read_into(at, memoryview(data))
        return bytes(data)

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
        A reader of each packed tensor by name, and the plain tensors, both in data order.

    Raises:
        CheckpointError: If the file cannot be read.
        FormatError: If a packed tensor is damaged, incomplete or of another version.
    """
    packed, plain = find_packed(shard.name, shard.header.tensors)
    readers = {name: PackedReader(file, planes) for name, planes in packed.items()}
    return readers, plain
