"""A tensor that is pruned: where it lies, how its rows run, and the layout they are packed in."""

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from emp_kernels.dispatch import PerRow, Threshold, Workspace, pack_rows, prune_rows
from emp_kernels.errors import NonFiniteRowError
from emp_kernels.layout import RADICES, RowLayout
from emp_kernels.numbers import NumberFormat
from emp_kernels.rows import Patterns

from emp_llm.checkpoint import Shard
from emp_llm.errors import CheckpointError
from emp_llm.geometry import Block, Geometry
from emp_llm.safetensors_header import TensorEntry

__all__ = ["Target"]

_SAMPLED_ROWS = 16
_LONG_ROW = 2048
"""Rows from this many columns on start at 16-byte boundaries; shorter ones would pay over 1 %."""


@dataclass(frozen=True, eq=False)
class Target:
    """A tensor of the source that is pruned.

    Attributes:
        shard: The file it lies in.
        entry: Its place there.
        geometry: How its rows run.
    """

    shard: Shard
    entry: TensorEntry
    geometry: Geometry
    _layouts: dict[str, RowLayout] = field(default_factory=dict, init=False, repr=False)
    _deciding: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.entry.name

    @property
    def path(self) -> Path:
        """The file it lies in."""
        return self.shard.path

    def read(self, fd: int, block: Block, workspace: Workspace) -> Patterns:
        """Read a block's bit patterns, [rows, columns]; they lie in the workspace.

        Raises:
            CheckpointError: If the file cannot be read.
        """
        buffer = workspace.take("weights", self.geometry.block_bytes(block))
        return self.geometry.read(fd, self.shard.name, self.entry.start, block, buffer)

    def not_finite(self, block: Block, error: NonFiniteRowError) -> CheckpointError:
        """The error that names the tensor and row where a block holds NaN or infinity."""
        row = self.geometry.first_row(block) + error.row
        return CheckpointError(
            f"{self.shard.name}: {self.name!r} row {row} holds NaN or infinity, which have no "
            f"magnitude to rank: repair the checkpoint or leave the tensor out with --ignore"
        )

    def layout(self, fd: int, rule: PerRow | Threshold) -> RowLayout:
        """The layout for the whole tensor, decided once: what packs a sample of its rows smallest.

        Whatever it is, packing is exact; the choice is only about size.
        """
        with self._deciding:
            if "chosen" not in self._layouts:
                self._layouts["chosen"] = self._decide(self._sample(fd), rule)
            return self._layouts["chosen"]

    @property
    def decided_layout(self) -> RowLayout:
        """The layout, once `layout` has decided it."""
        return self._layouts["chosen"]

    def _decide(self, sample: Patterns, rule: PerRow | Threshold) -> RowLayout:
        layout = RowLayout(
            number_format=self.geometry.number_format,
            columns=self.geometry.columns,
            align=16 if self.geometry.columns >= _LONG_ROW else 1,
        )
        try:
            pruned = prune_rows(sample, layout.number_format, rule).weights
        except NonFiniteRowError:
            return layout  # the block that holds the row tells of it
        choices = [
            replace(layout, dropped_bits=dropped_bits, radix=radix)
            for dropped_bits in sorted({0, _mostly_zero_bits(pruned, layout.number_format)})
            for radix in RADICES
        ]
        return min(choices, key=lambda choice: _packed_bytes(sample, choice, rule))

    def _sample(self, fd: int) -> Patterns:
        """Up to _SAMPLED_ROWS rows, evenly spaced; of a transposed tensor, within a first block."""
        workspace, geometry = Workspace(), self.geometry
        if geometry.transposed:
            first = self.read(fd, next(geometry.blocks()), workspace)
            return first[_spaced(len(first))]
        numbers = [divmod(row, geometry.matrix_rows) for row in _spaced(geometry.rows)]
        return np.concatenate(
            [self.read(fd, Block(m, r, r + 1), workspace).copy() for m, r in numbers]
        )


def _mostly_zero_bits(pruned: Patterns, number_format: NumberFormat) -> int:
    """Trailing mantissa bits that are zero in all but one in 32 of the weights that are left."""
    kept = pruned[pruned != 0]
    bits = 0
    while bits < number_format.mantissa_bits:
        exceptions = np.count_nonzero(kept & pruned.dtype.type((2 << bits) - 1))
        if exceptions * 32 > kept.size:
            break
        bits += 1
    return bits


def _spaced(rows: int) -> list[int]:
    count = min(rows, _SAMPLED_ROWS)
    return [i * rows // count for i in range(count)]


def _packed_bytes(sample: Patterns, layout: RowLayout, rule: PerRow | Threshold) -> int:
    table = pack_rows(sample, layout, rule, emit=False).table
    return int(layout.sections(table[:, 0], table[:, 1]).sum())
