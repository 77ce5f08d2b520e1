"""The layout that a tensor is packed in: what packs a sample of its rows smallest.

Whatever it is, packing is exact; the choice is only about size.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from emp_kernels.dispatch import PerRow, Threshold, pack_rows, prune_rows
from emp_kernels.errors import NonFiniteRowError
from emp_kernels.layout import RADICES, RowLayout
from emp_kernels.numbers import NumberFormat
from emp_kernels.rows import Patterns

from emp_llm.geometry import Block, Geometry

__all__ = ["choose_layout", "packed_bytes", "sample_rows"]

_SAMPLED_ROWS = 16
_LONG_ROW = 2048
"""Rows from this many columns on start at 16-byte boundaries; shorter ones would pay over 1 %."""


def sample_rows(geometry: Geometry, read: Callable[[Block], Patterns]) -> Patterns:
    """Up to _SAMPLED_ROWS rows, evenly spaced; of a transposed tensor, within a first block.

    Args:
        geometry: How the tensor's rows run.
        read: Gives the rows of a block; used up before it is called again.

    Returns:
        Bit patterns, [rows, columns].
    """
    if geometry.transposed:
        first = read(next(geometry.blocks()))
        return first[_spaced(len(first))]
    numbers = [divmod(row, geometry.matrix_rows) for row in _spaced(geometry.rows)]
    return np.concatenate([read(Block(m, r, r + 1)).copy() for m, r in numbers])


def choose_layout(sample: Patterns, geometry: Geometry, rule: PerRow | Threshold) -> RowLayout:
    """Choose the layout for a tensor.

    Args:
        sample: Some of its rows.
        geometry: How its rows run.
        rule: What is kept of them.
    """
    layout = RowLayout(
        number_format=geometry.number_format,
        columns=geometry.columns,
        align=16 if geometry.columns >= _LONG_ROW else 1,
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
    return min(choices, key=lambda choice: packed_bytes(sample, choice, rule))


def packed_bytes(sample: Patterns, layout: RowLayout, rule: PerRow | Threshold) -> int:
    """Bytes that the records of these rows take in a layout.

    Raises:
        NonFiniteRowError: If a weight is NaN or infinite.
    """
    table = pack_rows(sample, layout, rule, emit=False).table
    return int(layout.sections(table[:, 0], table[:, 1]).sum())


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
