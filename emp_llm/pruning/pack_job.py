"""Packs a target, or measures the bytes that packing it would give."""

import numpy as np
import numpy.typing as npt
from emp_kernels.dispatch import pack_rows
from emp_kernels.rows import Bytes, PackedRows, Patterns, Workspace

from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.pruning.shard_writer import Entry, ShardWriter
from emp_llm.pruning.target_job import TargetJob
from emp_llm.runtime.pipeline import Write
from emp_llm.selection.selection import Selection
from emp_llm.tensors.geometry import RowBlock
from emp_llm.tensors.packed import PackedTensor, padding
from emp_llm.tensors.planes import META_SUFFIX, ROWS_SUFFIX
from emp_llm.tensors.target import Target

__all__ = ["MeasureJob", "PackJob", "plane_entries", "plane_entries_at_most"]


def plane_entries(name: str, record_bytes: int, table_bytes: int, meta_bytes: int) -> list[Entry]:
    """The header's entries of a packed tensor's planes: records, row table and meta."""
    return [
        (name, "U8", (record_bytes,), record_bytes),
        (name + ROWS_SUFFIX, "U8", (table_bytes,), table_bytes),
        (name + META_SUFFIX, "I64", (meta_bytes // 8,), meta_bytes),
    ]


def plane_entries_at_most(name: str, nbytes: int) -> list[Entry]:
    """Entries with sizes that those of a packed tensor of so many dense bytes cannot exceed."""
    # no plane comes near: what counts is how many digits the header needs for the numbers
    most = nbytes * 8 + 64
    return plane_entries(name, most, most, most)


class MeasureJob(TargetJob[PackedRows]):
    """Finds what packing a target would give, and writes nothing."""

    emits = False

    def __init__(self, target: Target, file: SourceFile, selection: Selection) -> None:
        super().__init__(target, file, selection)
        self._nbytes = 0

    def compute(self, block: RowBlock, weights: Patterns, workspace: Workspace) -> PackedRows:
        """Table and sums of a row block, and its records if the job emits them."""
        rule = self._selection.rule(self.target, block)
        layout = self._selection.layout(self.target, self.file)
        return pack_rows(weights, layout, rule, emit=self.emits, workspace=workspace)

    def settle(self, _block: RowBlock, rows: PackedRows) -> Write | None:
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
        writer: The new file.
    """

    emits = True

    def __init__(
        self, target: Target, file: SourceFile, selection: Selection, writer: ShardWriter
    ) -> None:
        super().__init__(target, file, selection)
        self._writer = writer
        self._tables: list[npt.NDArray[np.int64]] = []

    @staticmethod
    def entries_at_most(target: Target) -> list[Entry]:
        """Entries with sizes that the final ones cannot exceed."""
        return plane_entries_at_most(target.name, target.geometry.nbytes)

    def settle(self, block: RowBlock, rows: PackedRows) -> Write:
        """Give the records their place."""
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
            plane_entries(self.target.name, self._nbytes + len(end), len(table), len(meta))
        )
        nbytes, _ = super().settle_end()
        return nbytes, self._append(np.frombuffer(end + table + meta, np.uint8))

    def _append(self, data: Bytes) -> Write:
        self.hash.update(data.data)
        offset = self._writer.allot(data.size)
        return lambda: self._writer.write(offset, data)
