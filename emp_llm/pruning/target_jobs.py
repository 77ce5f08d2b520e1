"""The pieces of work that turn a source shard into a pruned one; see `emp_llm.runtime.pipeline`.

TargetJob      a target, block by block: measured, packed, or with zeros in it
CopyJob        any other tensor, byte for byte
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial

import numpy as np
import numpy.typing as npt
from emp_kernels.dispatch import pack_rows, prune_rows
from emp_kernels.errors import NonFiniteRowError
from emp_kernels.rows import Bytes, PackedRows, Patterns, PrunedRows, RowStatistics, Workspace

from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.files.checksum import new_hash
from emp_llm.pruning.copy_job import DenseRows
from emp_llm.pruning.shard_writer import Entry, ShardWriter
from emp_llm.report.tensor_statistics import GroupTally, TensorStatistics
from emp_llm.runtime.pipeline import Piece, Write
from emp_llm.selection.selection import Selection
from emp_llm.tensors.geometry import RowBlock
from emp_llm.tensors.packed import PackedTensor, padding
from emp_llm.tensors.planes import META_SUFFIX, ROWS_SUFFIX
from emp_llm.tensors.target import Target

__all__ = ["DenseJob", "MeasureJob", "PackJob", "TargetJob"]


class TargetJob(ABC):
    """What is done with one target.

    Args:
        target: The tensor.
        file: Its file.
        selection: What to keep.

    Attributes:
        entry: The tensor's place in the source.
        statistics: What pruning does to it, once all is settled.
        checksum: Of the bytes that were written, once they are settled.
    """

    statistics: TensorStatistics

    def __init__(self, target: Target, file: SourceFile, selection: Selection) -> None:
        self.target = target
        self.entry = target.entry
        self.file = file
        self.checksum = new_hash()
        self._selection = selection
        self._tally = GroupTally(
            target.geometry.columns, selection.is_bounded, selection.groups_of(target)
        )

    def pieces(self) -> Iterator[Piece]:
        """The work, in order."""
        for block in self.target.geometry.row_blocks():
            nbytes = self.target.geometry.block_bytes(block)
            compute = partial(self._compute_block, block)
            yield Piece(nbytes, compute, partial(self._settle_block, block))
        yield Piece.note(self._finish)

    def _compute_block(self, block: RowBlock, workspace: Workspace) -> RowStatistics:
        weights = self._selection.read(self.target, self.file, block, workspace)
        try:
            rows = self.compute(block, weights, workspace)
        except NonFiniteRowError as error:
            raise self.target.not_finite(block, error) from error
        return self._selection.with_score_sums(self.target, block, rows)

    def _settle_block(self, block: RowBlock, rows: RowStatistics) -> Write | None:
        self._tally.add(rows)
        return self.settle(block, rows)

    def _finish(self) -> Write | None:
        nbytes, write = self.settle_end()
        self.statistics = self._tally.statistics(self.entry.shape, self.entry.nbytes, nbytes)
        return write

    @abstractmethod
    def compute(self, block: RowBlock, weights: Patterns, workspace: Workspace) -> RowStatistics:
        """Decide on a block; on any thread."""

    @abstractmethod
    def settle(self, block: RowBlock, rows: RowStatistics) -> Write | None:
        """Give a block its place, where it is to be written."""

    @abstractmethod
    def settle_end(self) -> tuple[int, Write | None]:
        """Bytes of the whole result, and what is left to write of it."""


class MeasureJob(TargetJob):
    """Finds what packing a target would give, and writes nothing."""

    emits = False

    def __init__(self, target: Target, file: SourceFile, selection: Selection) -> None:
        super().__init__(target, file, selection)
        self._nbytes = 0

    def compute(self, block: RowBlock, weights: Patterns, workspace: Workspace) -> PackedRows:
        """Table and stats of a block, and its records if the job emits them."""
        rule = self._selection.rule(self.target, block)
        layout = self._selection.layout(self.target, self.file)
        return pack_rows(weights, layout, rule, emit=self.emits, workspace=workspace)

    def settle(self, block: RowBlock, rows: RowStatistics) -> Write | None:  # noqa: ARG002
        """Count the bytes that its records would take."""
        table = rows.table
        self._nbytes += int(self._packed().layout.sections(table[:, 0], table[:, 1]).sum())
        return None

    def settle_end(self) -> tuple[int, Write | None]:
        """Bytes of all planes."""
        packed = self._packed()
        records = self._nbytes + len(padding(self._nbytes))
        return records + packed.table_bytes + len(packed.encode_meta()), None

    def _packed(self) -> PackedTensor:
        return PackedTensor(self.target.geometry, self.target.decided_layout)


class PackJob(MeasureJob):
    """Packs a target.

    Args:
        target: The tensor.
        file: Its file.
        selection: What to keep.
        writer: Where to.
    """

    emits = True

    def __init__(
        self, target: Target, file: SourceFile, selection: Selection, writer: ShardWriter
    ) -> None:
        super().__init__(target, file, selection)
        self._writer = writer
        self._tables: list[npt.NDArray[np.int64]] = []

    @staticmethod
    def entries(
        target: Target, record_bytes: int, table_bytes: int, meta_bytes: int
    ) -> list[Entry]:
        """What the header will say of it."""
        name = target.name
        return [
            (name, "U8", (record_bytes,), record_bytes),
            (name + ROWS_SUFFIX, "U8", (table_bytes,), table_bytes),
            (name + META_SUFFIX, "I64", (meta_bytes // 8,), meta_bytes),
        ]

    @classmethod
    def entries_at_most(cls, target: Target) -> list[Entry]:
        """Entries with sizes that the ones to come cannot exceed."""
        most = target.geometry.nbytes * 8 + 64
        return cls.entries(target, most, most, most)

    def settle(self, block: RowBlock, rows: RowStatistics) -> Write:
        """Give the records their place."""
        assert isinstance(rows, PackedRows)  # noqa: S101 (what compute returns)
        super().settle(block, rows)
        self._tables.append(rows.table)
        return self._append(rows.payload)

    def settle_end(self) -> tuple[int, Write]:
        """Bytes of all planes; row table and meta are still to be written."""
        packed = self._packed()
        table = packed.encode_table(np.concatenate(self._tables))
        meta = packed.encode_meta()
        end = padding(self._nbytes)
        self._writer.add_entries(
            self.entries(self.target, self._nbytes + len(end), len(table), len(meta))
        )
        nbytes, _ = super().settle_end()
        return nbytes, self._append(np.frombuffer(end + table + meta, np.uint8))

    def _append(self, data: Bytes) -> Write:
        self.checksum.update(data.data)
        offset = self._writer.allot(data.size)
        return lambda: self._writer.write(offset, data)


class DenseJob(TargetJob):
    """Puts zeros in a target.

    Args:
        target: The tensor.
        file: Its file.
        selection: What to keep.
        writer: Where to.
    """

    def __init__(
        self, target: Target, file: SourceFile, selection: Selection, writer: ShardWriter
    ) -> None:
        super().__init__(target, file, selection)
        self._rows = DenseRows(self.entry, target.geometry, writer)
        self.checksum = self._rows.checksum

    def compute(self, block: RowBlock, weights: Patterns, workspace: Workspace) -> PrunedRows:
        """A block with zeros in it, in place, and its table and stats."""
        rule = self._selection.rule(self.target, block)
        number_format = self.target.geometry.number_format
        return prune_rows(weights, number_format, rule, out=weights, workspace=workspace)

    def settle(self, block: RowBlock, rows: RowStatistics) -> Write:
        """Give the rows their place."""
        assert isinstance(rows, PrunedRows)  # noqa: S101 (what compute returns)
        return self._rows.place(block, rows.weights)

    def settle_end(self) -> tuple[int, None]:
        """Bytes of the tensor."""
        return self.entry.nbytes, None
