"""Packs a tensor that is not pruned, every bit of it, or measures the bytes that this gives."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

import numpy as np
import numpy.typing as npt
from emp_kernels.dispatch import pack_whole
from emp_kernels.numbers import FORMATS
from emp_kernels.rows import Bytes, Patterns, WholeRecords, Workspace
from emp_kernels.whole_layout import WholeLayout

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.safetensors_header import ALIGNMENT
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.errors import CheckpointError
from emp_llm.files.checksum import hash_name, new_hash
from emp_llm.pruning.copy_job import CopyJob
from emp_llm.pruning.pack_job import plane_entries, plane_entries_at_most
from emp_llm.pruning.shard_writer import Entry, ShardWriter
from emp_llm.runtime.once import Once
from emp_llm.runtime.pipeline import Piece, Write
from emp_llm.tensors.code_choice import SMALLEST_PACKED, choose_code, read_sample, record_rows
from emp_llm.tensors.geometry import RowBlock, WholeGeometry
from emp_llm.tensors.packed import padding
from emp_llm.tensors.row_reader import PlainReader
from emp_llm.tensors.whole import WholeTensor

__all__ = ["MeasureRestJob", "RestJob", "rest_geometry"]


def rest_geometry(entry: TensorEntry) -> WholeGeometry | None:
    """The rows and records of a tensor that is packed without being pruned; None if it stays plain.

    Packed are tensors of two dimensions or more, of a dtype that can be packed, and of 64 KiB or
    more. Their bytes must be a multiple of 16: one that turns out not to get smaller is copied, and
    what lies behind it in the file has to stay aligned.
    """
    number_format = FORMATS.get(entry.dtype)
    if (
        number_format is None
        or len(entry.shape) < 2
        or entry.nbytes < SMALLEST_PACKED
        or entry.nbytes % ALIGNMENT
    ):
        return None
    try:
        return WholeGeometry(
            number_format=number_format,
            shape=entry.shape,
            record_rows=record_rows(entry.shape[-1]),
        )
    except CheckpointError:  # larger than a tensor of any model that is pruned: copied
        return None


@dataclass(frozen=True)
class _PlainRows:
    """A row block of a tensor that would not get smaller."""

    payload: Bytes


class MeasureRestJob:
    """Measures the bytes that packing a tensor without pruning it gives, and writes nothing.

    Args:
        entry: The tensor's place in the source.
        geometry: How its rows run.
        file: Its file.

    Attributes:
        entry: The tensor's place in the source.
        statistics: None; nothing is pruned.
        packed_bytes: Bytes of its planes; None if it stays plain. Known once all is settled.
    """

    statistics: Final = None
    emits = False

    def __init__(self, entry: TensorEntry, geometry: WholeGeometry, file: SourceFile) -> None:
        self.entry = entry
        self.packed_bytes: int | None = None
        self.geometry = geometry
        self._file = file
        self._reader = PlainReader(file, entry, geometry)
        self._layout = Once[WholeLayout | None]()
        self._nbytes = 0

    def pieces(self) -> Iterator[Piece]:
        """The work, in order."""
        for block in self.geometry.row_blocks():
            nbytes = self.geometry.block_bytes(block)
            yield Piece(nbytes, partial(self._compute, block), self.settle)
        yield Piece.note(self.settle_end)

    def settle(self, records: WholeRecords | _PlainRows) -> Write | None:
        """Count the bytes of some records; in order."""
        if isinstance(records, WholeRecords):
            self._nbytes += int(records.lengths.sum())
        return None

    def settle_end(self) -> Write | None:
        """Add up the planes."""
        if whole := self._whole:
            records = self._nbytes + len(padding(self._nbytes))
            self.packed_bytes = records + whole.table_bytes + len(whole.encode_meta())
        return None

    @property
    def _whole(self) -> WholeTensor | None:
        """What is known of the packed tensor, once its code is chosen; None if it stays plain."""
        layout = self._layout.value
        return None if layout is None else WholeTensor(self.geometry, layout)

    def _compute(self, block: RowBlock, workspace: Workspace) -> WholeRecords | _PlainRows:
        layout = self._layout.get(self._choose)
        stored = self._reader.read(block, workspace)
        if layout is None:
            return _PlainRows(stored.stored)
        return pack_whole(stored.rows, layout, emit=self.emits, workspace=workspace)

    def _choose(self) -> WholeLayout | None:
        workspace = Workspace()

        def read(block: RowBlock) -> Patterns:
            return self._reader.read(block, workspace).rows

        return choose_code(read_sample(self.geometry, read), self.geometry)


class RestJob(MeasureRestJob):
    """Packs a tensor without pruning it, or copies it if it would not get smaller.

    Args:
        entry: The tensor's place in the source.
        geometry: How its rows run.
        file: Its file.
        writer: The new file.
    """

    emits = True

    def __init__(
        self, entry: TensorEntry, geometry: WholeGeometry, file: SourceFile, writer: ShardWriter
    ) -> None:
        super().__init__(entry, geometry, file)
        self._writer = writer
        self._hash = new_hash()
        self._lengths: list[npt.NDArray[np.int64]] = []

    @property
    def checksum(self) -> str:
        """Checksum of the bytes that were written, once all are settled."""
        return hash_name(self._hash)

    @staticmethod
    def entries_at_most(entry: TensorEntry) -> list[Entry]:
        """Entries with sizes that the final ones cannot exceed."""
        return plane_entries_at_most(entry.name, entry.nbytes)

    def settle(self, records: WholeRecords | _PlainRows) -> Write:
        """Give the records their place."""
        super().settle(records)
        if isinstance(records, WholeRecords):
            self._lengths.append(records.lengths)
        return self._append(records.payload)

    def settle_end(self) -> Write | None:
        """Write the table of lengths and the parameters; add the header's entries."""
        super().settle_end()
        whole = self._whole
        if whole is None:
            self._writer.add_entries(CopyJob.entries(self.entry))
            return None
        table = whole.encode_table(np.concatenate(self._lengths))
        meta, end = whole.encode_meta(), padding(self._nbytes)
        self._writer.add_entries(
            plane_entries(self.entry.name, self._nbytes + len(end), len(table), len(meta))
        )
        return self._append(np.frombuffer(end + table + meta, np.uint8))

    def _append(self, data: Bytes) -> Write:
        self._hash.update(data.data)
        offset = self._writer.allot(data.size)
        return lambda: self._writer.write(offset, data)
