"""What all jobs on a target have in common: its row blocks are read, pruned and counted."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import Final, Generic, TypeVar

from emp_kernels.errors import NonFiniteRowError
from emp_kernels.rows import Patterns, RowStatistics, Workspace

from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.files.checksum import hash_name, new_hash
from emp_llm.report.tensor_statistics import GroupTally, TensorStatistics
from emp_llm.runtime.pipeline import Piece, Write
from emp_llm.selection.selection import Selection
from emp_llm.tensors.geometry import RowBlock
from emp_llm.tensors.target import Target

__all__ = ["Rows", "TargetJob"]

Rows = TypeVar("Rows", bound=RowStatistics)
"""What a kind of job finds in a row block."""


class TargetJob(ABC, Generic[Rows]):
    """What is done with one target.

    Args:
        target: The tensor.
        file: Its file.
        selection: What to keep.

    Attributes:
        entry: The tensor's place in the source.
        statistics: Statistics of its pruning; complete once all pieces are settled.
        hash: Hash of the bytes that are written; complete once all pieces are settled.
        packed_bytes: None; `statistics` tell how many bytes a target takes.
    """

    statistics: TensorStatistics
    packed_bytes: Final = None

    def __init__(self, target: Target, file: SourceFile, selection: Selection) -> None:
        self.target = target
        self.entry = target.entry
        self.file = file
        self.hash = new_hash()
        self._selection = selection
        self._tally = GroupTally(
            target.geometry.columns, selection.is_bounded, selection.groups_of(target)
        )

    @property
    def checksum(self) -> str:
        """`hash` as reports hold it."""
        return hash_name(self.hash)

    def pieces(self) -> Iterator[Piece]:
        """The work, in order."""
        for block in self.target.geometry.row_blocks():
            nbytes = self.target.geometry.block_bytes(block)
            compute = partial(self._compute_block, block)
            yield Piece(nbytes, compute, partial(self._settle_block, block))
        yield Piece.note(self._finish)

    def tally(self, rows: Rows) -> None:
        """Count a row block; in order."""
        self._tally.add(rows)

    @abstractmethod
    def compute(self, block: RowBlock, weights: Patterns, workspace: Workspace) -> Rows:
        """Decide on a row block; on any thread."""

    @abstractmethod
    def settle(self, block: RowBlock, rows: Rows) -> Write | None:
        """Give a row block its place in the file, where one is written; in order."""

    @abstractmethod
    def settle_end(self) -> tuple[int, Write | None]:
        """Bytes of the whole result, and what is left to write of it."""

    def _compute_block(self, block: RowBlock, workspace: Workspace) -> Rows:
        weights = self._selection.read(self.target, self.file, block, workspace)
        try:
            rows = self.compute(block, weights, workspace)
        except NonFiniteRowError as error:
            raise self.target.not_finite(block, error) from error
        return self._selection.with_score_sums(self.target, block, rows)

    def _settle_block(self, block: RowBlock, rows: Rows) -> Write | None:
        self.tally(rows)
        return self.settle(block, rows)

    def _finish(self) -> Write | None:
        nbytes, write = self.settle_end()
        self.statistics = self._tally.statistics(self.entry.shape, self.entry.nbytes, nbytes)
        return write
