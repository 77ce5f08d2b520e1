"""The layout that a tensor is packed in: the one that packs a sample of its rows smallest.

Packing is exact in every layout; the choice is only about size.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import chain

import numpy as np
import numpy.typing as npt
from emp_kernels.dispatch import count_rows, pack_rows, sweep_rows, trailing_zeros
from emp_kernels.errors import NonFiniteRowError
from emp_kernels.layout import RADICES, RowLayout
from emp_kernels.numbers import NumberFormat
from emp_kernels.rows import Given, Patterns, PerRow, Rule, Threshold

from emp_llm.tensors.geometry import Geometry, RowBlock

__all__ = ["choose_layout", "choose_layouts", "packed_bytes", "sample_blocks", "sample_rows"]

_SAMPLED_ROWS = 16
_LONG_ROW = 2048
"""Rows of at least so many columns are aligned to 16 bytes; shorter ones would grow over 1 %."""


def sample_rows(geometry: Geometry, read: Callable[[RowBlock], Patterns]) -> Patterns:
    """Up to 16 rows, evenly spaced; of a transposed tensor, all of them in its first row block.

    Args:
        geometry: How the tensor's rows run.
        read: Returns the rows of a row block, which are copied before it is called again.

    Returns:
        Bit patterns, uint16 or uint32 [rows, columns].
    """
    if geometry.transposed:
        first = read(next(geometry.row_blocks()))
        return first[_spaced(len(first))]
    return np.concatenate([read(block).copy() for block in sample_blocks(geometry)])


def sample_blocks(geometry: Geometry) -> list[RowBlock]:
    """The row blocks that `sample_rows` reads."""
    if geometry.transposed:
        return [next(geometry.row_blocks())]
    numbers = [divmod(row, geometry.matrix_rows) for row in _spaced(geometry.rows)]
    return [RowBlock(m, r, r + 1) for m, r in numbers]


def choose_layout(sample: Patterns, geometry: Geometry, rule: Rule) -> RowLayout:
    """Choose the layout for a tensor.

    Args:
        sample: Some of its rows.
        geometry: How its rows run.
        rule: What is kept of them.
    """
    number_format = geometry.number_format
    try:
        if isinstance(rule, Given):
            choices = _choices(_plainest(geometry), _given_zero_bits(sample, number_format, rule))
            return min(choices, key=lambda layout: packed_bytes(sample, layout, rule))
        if isinstance(rule, PerRow):
            kept = count_rows(sample, number_format, [rule.beta]).kept
        else:
            kept = _reaching(sample, number_format, rule)
    except NonFiniteRowError:
        return _plainest(geometry)  # the pass over all row blocks raises the error
    return choose_layouts(sample, geometry, kept)[0]


def choose_layouts(
    sample: Patterns, geometry: Geometry, kept: npt.NDArray[np.int64]
) -> list[RowLayout]:
    """Choose the layout for a tensor in each of B cases, such as B values of β.

    Args:
        sample: Some of its rows, [R, C], all finite.
        geometry: How its rows run.
        kept: int64 [R, B], how many of each row's weights stay in each case: the largest ones.

    Returns:
        B layouts.
    """
    number_format = geometry.number_format
    zeros = trailing_zeros(sample, number_format, kept)
    plainest = _plainest(geometry)
    cases = [_choices(plainest, _mostly_zero_bits(found, number_format)) for found in zeros]
    points = np.repeat(kept, [len(choices) for choices in cases], axis=1)
    nbytes = iter(sweep_rows(sample, points, list(chain.from_iterable(cases))).record_bytes)
    return [min(choices, key=lambda _: next(nbytes)) for choices in cases]


@lru_cache(256)
def _choices(plainest: RowLayout, zero_bits: int) -> tuple[RowLayout, ...]:
    """The layouts to choose from if so many trailing mantissa bits are mostly zero."""
    return tuple(
        replace(plainest, dropped_bits=dropped_bits, radix=radix)
        for dropped_bits in sorted({0, zero_bits})
        for radix in RADICES
    )


def _plainest(geometry: Geometry) -> RowLayout:
    return RowLayout(
        number_format=geometry.number_format,
        columns=geometry.columns,
        align=16 if geometry.columns >= _LONG_ROW else 1,
    )


def _reaching(
    sample: Patterns, number_format: NumberFormat, rule: Threshold
) -> npt.NDArray[np.int64]:
    """How many weights of each row a threshold keeps, int64 [R, 1]."""
    keys = sample & number_format.storage.type(number_format.key_mask)
    if keys.size and keys.max() >= number_format.infinity:
        raise NonFiniteRowError(int((keys >= number_format.infinity).any(axis=1).argmax()))
    tied = np.cumsum((keys == rule.key).sum(axis=1))
    kept: npt.NDArray[np.int64] = (keys > rule.key).sum(axis=1)
    kept += np.diff(np.minimum(tied, rule.ties), prepend=0)
    return kept.reshape(-1, 1)


def packed_bytes(sample: Patterns, layout: RowLayout, rule: Rule) -> int:
    """Bytes that the records of these rows take in a layout.

    Raises:
        NonFiniteRowError: If a weight is NaN or infinite.
    """
    table = pack_rows(sample, layout, rule, emit=False).table
    return int(layout.sections(table[:, 0], table[:, 1]).sum())


def _given_zero_bits(sample: Patterns, number_format: NumberFormat, rule: Given) -> int:
    """`_mostly_zero_bits` of the weights that a mask keeps."""
    keep = np.unpackbits(rule.mask, axis=1, count=sample.shape[1], bitorder="little")
    keys = (sample & number_format.storage.type(number_format.key_mask))[keep.astype(np.bool_)]
    keys = keys[keys > 0].astype(np.int64)
    ends = np.log2(keys & -keys).astype(np.int64)
    return _mostly_zero_bits(np.bincount(ends, minlength=32), number_format)


def _mostly_zero_bits(zeros: npt.NDArray[np.int64], number_format: NumberFormat) -> int:
    """How many trailing mantissa bits are zero in all but one in 32 of the kept weights.

    Each of the others escapes, which takes 16 or 32 bits more: at one in 32, no more than dropping
    a single bit saves.

    Args:
        zeros: int64 [32], the kept weights counted by their number of trailing zero bits.
        number_format: Their format.
    """
    exceptions = np.cumsum(zeros) * 32 > zeros.sum()
    return int(np.argmax([*exceptions[: number_format.mantissa_bits], True]))


def _spaced(rows: int) -> list[int]:
    count = min(rows, _SAMPLED_ROWS)
    return [i * rows // count for i in range(count)]
