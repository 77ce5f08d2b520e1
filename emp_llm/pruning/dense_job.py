"""Writes a tensor's rows dense, row block by row block: pruned, with zeros in them, or unpacked."""

from emp_kernels.dispatch import prune_rows
from emp_kernels.rows import Patterns, PrunedRows, Workspace

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.files.checksum import new_hash
from emp_llm.pruning.copy_job import CopyJob
from emp_llm.pruning.shard_writer import ShardWriter
from emp_llm.pruning.target_job import TargetJob
from emp_llm.runtime.pipeline import Write
from emp_llm.selection.selection import Selection
from emp_llm.tensors.geometry import Geometry, RowBlock
from emp_llm.tensors.target import Target

__all__ = ["DenseJob", "DenseRows"]


class DenseRows:
    """Places the rows of a tensor in a file.

    Args:
        entry: The tensor as the file will have it.
        geometry: How its rows lie in the file.
        writer: The file.

    Attributes:
        hash: Hash of its weights in the order of rows; complete once all are placed.
    """

    def __init__(self, entry: TensorEntry, geometry: Geometry, writer: ShardWriter) -> None:
        self.hash = new_hash()
        self._entry = entry
        self._geometry = geometry
        self._writer = writer
        self._offset = -1

    def place(self, block: RowBlock, weights: Patterns) -> Write:
        """Give a row block its place; in order."""
        if self._offset < 0:
            self._offset = self._writer.allot(self._entry.nbytes)
            self._writer.add_entries(CopyJob.entries(self._entry))
        self.hash.update(weights.data)
        return lambda: self._writer.write_rows(self._geometry, self._offset, block, weights)


class DenseJob(TargetJob[PrunedRows]):
    """Puts zeros in a target.

    Args:
        target: The tensor.
        file: Its file.
        selection: What to keep.
        writer: The new file.
    """

    def __init__(
        self, target: Target, file: SourceFile, selection: Selection, writer: ShardWriter
    ) -> None:
        super().__init__(target, file, selection)
        self._rows = DenseRows(self.entry, target.geometry, writer)
        self.hash = self._rows.hash

    def compute(self, block: RowBlock, weights: Patterns, workspace: Workspace) -> PrunedRows:
        """A row block with zeros in it, in place, and its table and sums."""
        rule = self._selection.rule(self.target, block)
        number_format = self.target.geometry.number_format
        return prune_rows(weights, number_format, rule, out=weights, workspace=workspace)

    def settle(self, block: RowBlock, rows: PrunedRows) -> Write:
        """Give the rows their place."""
        return self._rows.place(block, rows.weights)

    def settle_end(self) -> tuple[int, None]:
        """Bytes of the tensor."""
        return self.entry.nbytes, None
