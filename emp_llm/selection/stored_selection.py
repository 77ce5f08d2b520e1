"""The decisions on disk as what the straight line asks: masks, weights and figures of any rows."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from emp_kernels.rows import Given, Patterns, RowFigures, Rule, Workspace

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.options import PruneOptions
from emp_llm.report.tensor_statistics import Group
from emp_llm.selection.mask_store import MaskStore
from emp_llm.selection.selection import Selection
from emp_llm.tensors.geometry import RowBlock
from emp_llm.tensors.layout_choice import sample_rows
from emp_llm.tensors.target import Target

__all__ = ["GivenSelection"]


class GivenSelection(Selection):
    """What was decided on all targets.

    Args:
        options: The rule that it was decided by.
        store: The decisions.
    """

    def __init__(self, options: PruneOptions, store: MaskStore) -> None:
        super().__init__(options.beta, {}, {})
        self._by_score = options.criterion == "magnitude" or options.count_by == "criterion"
        self._store = store

    @property
    def is_bounded(self) -> bool:
        """Whether the count is that of the scores that are told of."""
        return super().is_bounded and self._by_score

    def groups_of(self, target: Target) -> Sequence[Group] | None:
        """The groups of scores that a target's matrices belong to."""
        return self._store.groups(target.name) or None

    def rule(self, target: Target, block: RowBlock) -> Rule:
        """The mask of one of a target's blocks."""
        first, stop = _rows(target, block)
        return Given(self._store.read_mask(target.name, first, stop))

    def read(
        self, target: Target, file: SourceFile, block: RowBlock, workspace: Workspace
    ) -> Patterns:
        """The repaired weights of a target's rows, or the source's."""
        weights = self._store.weights(target.name, *_rows(target, block))
        return super().read(target, file, block, workspace) if weights is None else weights

    def with_score_sums(self, target: Target, block: RowBlock, rows: RowFigures) -> RowFigures:
        """The block's rows, with the figures of their scores."""
        return replace(rows, stats=self._store.stats(target.name, *_rows(target, block)))

    def copied_from(self, entry: TensorEntry, file: SourceFile) -> SourceFile:
        """The bytes that a tensor was given instead of the source's, or the source's file."""
        data = self._store.replaced(entry.name)
        return file if data is None else _Replaced(entry, data)

    def _sample_rule(self, target: Target) -> Rule:
        """The masks of these very rows."""

        def masks(block: RowBlock) -> Patterns:
            return self._store.read_mask(target.name, *_rows(target, block))

        return Given(np.ascontiguousarray(sample_rows(target.geometry, masks)))


def _rows(target: Target, block: RowBlock) -> tuple[int, int]:
    """A block's rows, among those of the whole tensor."""
    first = target.geometry.first_row(block)
    return first, first + block.stop - block.start


class _Replaced(SourceFile):
    """New bytes of a tensor, at the place that it has in the source."""

    def __init__(self, entry: TensorEntry, data: bytes) -> None:
        self.name = entry.name
        self._start = entry.start
        self._data = data

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from an offset on."""
        at = offset - self._start
        buffer[:] = self._data[at : at + len(buffer)]

    def close(self) -> None:
        """Nothing more is to be read."""
