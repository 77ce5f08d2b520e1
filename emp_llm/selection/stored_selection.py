"""Masks and repaired weights read from the store, instead of masks decided by the weights alone."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from emp_kernels.rows import Given, Patterns, Rule, Workspace

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.options import PruneOptions
from emp_llm.report.tensor_statistics import Group
from emp_llm.selection.mask_store import MaskStore
from emp_llm.selection.selection import Rows, Selection
from emp_llm.tensors.geometry import RowBlock
from emp_llm.tensors.layout_choice import sample_rows
from emp_llm.tensors.target import Target

__all__ = ["StoredSelection"]


class StoredSelection(Selection):
    """The masks and weights that are stored of all targets.

    Args:
        options: The rule that the masks were made by.
        store: Masks and repaired weights of all targets.
    """

    def __init__(self, options: PruneOptions, store: MaskStore) -> None:
        super().__init__(options.beta, {}, {})
        # with count_by="magnitude", k is that of other values than the scores that are reported;
        # swaps keep others than those with the largest scores, and an allocation has its own counts
        by_score = options.criterion == "magnitude" or options.count_by == "criterion"
        swapped, allocated = options.repair == "swaps", options.allocate != "emp"
        self._largest = by_score and not swapped and not allocated
        self._store = store

    @property
    def is_bounded(self) -> bool:
        """Whether the bound holds: where the largest of the scores that are reported are kept."""
        return super().is_bounded and self._largest

    def groups_of(self, target: Target) -> Sequence[Group] | None:
        """The group of scores of each of a target's matrices; None where each row is a group."""
        return self._store.groups(target.name) or None

    def rule(self, target: Target, block: RowBlock) -> Rule:
        """The mask of one of a target's row blocks."""
        first, stop = _rows(target, block)
        return Given(self._store.read_mask(target.name, first, stop))

    def read(
        self, target: Target, file: SourceFile, block: RowBlock, workspace: Workspace
    ) -> Patterns:
        """The repaired weights of a target's rows, or the source's where they are unchanged."""
        weights = self._store.weights(target.name, *_rows(target, block))
        return super().read(target, file, block, workspace) if weights is None else weights

    def with_score_sums(self, target: Target, block: RowBlock, rows: Rows) -> Rows:
        """The statistics of a pruned row block, with sums of its scores, not of magnitudes."""
        return replace(rows, stats=self._store.stats(target.name, *_rows(target, block)))

    def copied_from(self, entry: TensorEntry, file: SourceFile) -> SourceFile:
        """A tensor's new bytes as a file, or the source's file where they are unchanged."""
        data = self._store.replaced(entry.name)
        return file if data is None else _Replaced(entry, data)

    def _sample_rule(self, target: Target) -> Rule:
        """The stored masks of the rows that `sample_rows` takes."""

        def masks(block: RowBlock) -> Patterns:
            return self._store.read_mask(target.name, *_rows(target, block))

        return Given(np.ascontiguousarray(sample_rows(target.geometry, masks)))


def _rows(target: Target, block: RowBlock) -> tuple[int, int]:
    """The first row of a row block and the one behind it, among all rows of the tensor."""
    first = target.geometry.first_row(block)
    return first, first + block.stop - block.start


class _Replaced(SourceFile):
    """New bytes of a tensor, at its offset in the source's file."""

    def __init__(self, entry: TensorEntry, data: bytes) -> None:
        self.name = entry.name
        self._start = entry.start
        self._data = data

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from an offset in the source's file on."""
        at = offset - self._start
        buffer[:] = self._data[at : at + len(buffer)]

    def close(self) -> None:
        """Nothing is open."""
