"""The code that a tensor which is not pruned is packed with: the one that packs a sample smallest.

Packing is exact with every code; the choice is only about size.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from emp_kernels.dispatch import pack_whole
from emp_kernels.numbers import NumberFormat
from emp_kernels.rows import Patterns
from emp_kernels.whole_layout import (
    MAX_SYMBOLS,
    MAX_TIERS,
    MAX_WIDTH,
    WholeLayout,
    context_bits,
)

from emp_llm.tensors.geometry import RowBlock, WholeGeometry

__all__ = [
    "SMALLEST_PACKED",
    "choose_code",
    "read_sample",
    "record_rows",
    "sample_places",
]

SMALLEST_PACKED = 1 << 16
"""Bytes of the smallest tensor that is packed without being pruned; what is smaller stays plain."""

_RECORD_WEIGHTS = 16384
"""The fewest weights of a record; a row that has more is a record.

The larger records are, the fewer lengths are stored, and the fewer bytes at the ends of stripes are
partly empty. At this size, what a core works on still fits in its own cache, and the codes of a
record fit in the shared memory of a GPU's block of threads.
"""

_SAMPLED_PLACES = 64

_SAMPLED_WEIGHTS = 1024
"""The fewest weights to read in each place."""

_WORTH = 0.97
"""A tensor is packed if its sample takes at most this share of its bytes."""

_LOST_ONE_IN = 64
"""Trailing bits are dropped if at most one weight in so many has one set, and escapes."""


def record_rows(columns: int) -> int:
    """How many rows of so many weights a record takes."""
    return -(-_RECORD_WEIGHTS // columns)


def read_sample(geometry: WholeGeometry, read: Callable[[RowBlock], Patterns]) -> Patterns:
    """Some rows from each of up to 64 evenly spaced places.

    Args:
        geometry: How the tensor's rows run.
        read: Returns rows of the tensor, which are copied before it is called again.

    Returns:
        Bit patterns, uint16 or uint32 [rows, columns].
    """
    return np.concatenate([read(block).copy() for block in sample_places(geometry)])


def sample_places(geometry: WholeGeometry) -> list[RowBlock]:
    """The rows that `read_sample` reads, place by place."""
    rows, step = geometry.rows, -(-_SAMPLED_WEIGHTS // geometry.columns)
    places = -(-rows // step)
    count = min(places, _SAMPLED_PLACES)
    starts = [i * places // count * step for i in range(count)]
    return [RowBlock(0, start, min(start + step, rows)) for start in starts]


def choose_code(sample: Patterns, geometry: WholeGeometry) -> WholeLayout | None:
    """Choose the code for a tensor.

    Args:
        sample: Some of its rows.
        geometry: How its rows run.

    Returns:
        The layout; None if the tensor would hardly get smaller, and is better left plain.
    """
    number_format, weights = geometry.number_format, geometry.record_weights
    dropped = _droppable_bits(sample, number_format)
    counts, escaping = _count_exponents(sample, number_format, dropped)
    escape_bytes = _layout(number_format, weights, dropped, (1,), counts).escape_bytes
    # no tier starts behind the last exponent that occurs, so none ends much further
    last = int(np.count_nonzero(counts.any(axis=0))) + (1 << MAX_WIDTH) - 2
    room = min(MAX_SYMBOLS, counts.shape[1], last)
    listed = counts[:, _most_frequent(counts, room)]
    by_place = -np.sort(-listed, axis=1).sum(axis=0)
    escaping += int(counts.sum() - listed.sum())
    widths = _best_widths(by_place, escaping, 8 * escape_bytes)
    layout = _layout(number_format, weights, dropped, widths, counts)
    packed = pack_whole(np.ascontiguousarray(sample), layout, emit=False).lengths.sum()
    return layout if packed <= _WORTH * sample.nbytes else None


def _layout(
    number_format: NumberFormat,
    weights: int,
    dropped: int,
    widths: tuple[int, ...],
    counts: npt.NDArray[np.int64],
) -> WholeLayout:
    listed = _most_frequent(counts, sum((1 << width) - 1 for width in widths))
    lists = listed[np.argsort(-counts[:, listed], axis=1, kind="stable")]
    return WholeLayout(
        number_format=number_format,
        weights=weights,
        widths=widths,
        exponents=tuple(tuple(one) for one in lists.tolist()),
        dropped_bits=dropped,
    )


def _most_frequent(counts: npt.NDArray[np.int64], number: int) -> npt.NDArray[np.int64]:
    """So many exponents, the most frequent of all contexts together, ascending."""
    return np.sort(np.argsort(-counts.sum(axis=0), kind="stable")[:number])


def _droppable_bits(sample: Patterns, number_format: NumberFormat) -> int:
    """How many trailing bits of the mantissa are zero in nearly all weights that are not zero."""
    low = sample.reshape(-1) & sample.dtype.type((1 << number_format.mantissa_bits) - 1)
    keys = sample.reshape(-1) & sample.dtype.type(number_format.key_mask)
    low = low[keys != 0]
    for bits in range(1, number_format.mantissa_bits + 1):
        lost = np.count_nonzero(low & low.dtype.type((1 << bits) - 1))
        if lost * _LOST_ONE_IN > low.size:
            return bits - 1
    return number_format.mantissa_bits


def _count_exponents(
    sample: Patterns, number_format: NumberFormat, dropped: int
) -> tuple[npt.NDArray[np.int64], int]:
    """How many weights of each context have each exponent, int64 [contexts, exponents].

    Besides, how many escape for their dropped bits: they are not in these counts.
    """
    flat = sample.reshape(-1)
    whole = flat[flat & flat.dtype.type((1 << dropped) - 1) == 0] if dropped else flat
    context = context_bits(number_format.mantissa_bits - dropped)
    below = flat.dtype.type(number_format.mantissa_bits - context)
    keys = whole & flat.dtype.type(number_format.key_mask)
    bins = 1 << (number_format.bits - 1 - number_format.mantissa_bits + context)
    counts: npt.NDArray[np.int64] = np.bincount(keys >> below, minlength=bins)
    return counts.reshape(-1, 1 << context).T, flat.size - whole.size


def _best_widths(counts: npt.NDArray[np.int64], escaping: int, escape_bits: int) -> tuple[int, ...]:
    """The tiers that take the fewest bits.

    Args:
        counts: How many weights have the exponent in each place of their list, int64 [places];
            there are as many places as tiers may have symbols at most.
        escaping: How many weights escape besides them, whatever the tiers are.
        escape_bits: Bits of an escape.
    """
    room = counts.size
    left = escaping + np.append(np.cumsum(counts[::-1])[::-1], 0)

    # by place: the fewest bits for the weights past it, with none, one, two ... tiers
    bits = left * escape_bits
    chosen = []
    for _ in range(MAX_TIERS):
        choices = np.full((1 + MAX_WIDTH, room + 1), np.iinfo(np.int64).max)
        choices[0] = bits
        for width in range(1, MAX_WIDTH + 1):
            symbols = (1 << width) - 1
            if symbols <= room:
                choices[width, :-symbols] = left[:-symbols] * width + bits[symbols:]
        chosen.append(choices.argmin(axis=0).tolist())
        bits = choices.min(axis=0)
    place, widths = 0, []
    for best in reversed(chosen):
        if width := best[place]:
            widths.append(width)
            place += (1 << width) - 1
    return tuple(widths) or (1,)
