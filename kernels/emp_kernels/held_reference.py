"""Products from packed rows that are held in memory, in plain numpy: float64, row by row."""

import numpy as np
import numpy.typing as npt

from emp_kernels import reference, whole_reference
from emp_kernels.held import HeldRows, HeldWhole, held_rows, held_whole, room_for_places
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import BF16, F16, NumberFormat
from emp_kernels.rows import Bytes, Counts, Patterns, Table
from emp_kernels.whole_layout import WholeLayout

__all__ = [
    "hold_rows",
    "hold_whole",
    "multiply_rows",
    "rounded",
    "unpack_row",
    "unpack_whole_rows",
    "values_of",
]


def hold_rows(
    payload: Bytes, sections: npt.NDArray[np.int64], table: Table, layout: RowLayout
) -> HeldRows:
    """Rows that have been checked, with the places of their escapes; see `held_rows`."""
    ends = np.cumsum(sections.sum(axis=1)).tolist()
    places = []
    for (kept, escaped, _), start, end in zip(table.tolist(), [0, *ends], ends, strict=False):
        places += reference.escape_places(payload[start:end].tobytes(), kept, escaped, layout)
    room = room_for_places(table, layout)
    room[:] = places
    return held_rows(payload, sections, table, layout, room)


def unpack_row(held: HeldRows, row: int) -> Patterns:
    """The bit patterns of one row, [C]."""
    start, end = held.offsets[row : row + 2].tolist()
    kept, escaped, base = held.table[row].tolist()
    record = held.payload[start:end].tobytes()
    return reference.unpack_row(record, kept, escaped, base, held.layout)


def hold_whole(
    payload: Bytes, lengths: Counts, layout: WholeLayout, rows: int, columns: int
) -> HeldWhole:
    """Records that have been checked, with what is known of their tiers; see `held_whole`."""
    held = held_whole(payload, lengths, layout, columns, rows * columns)
    for record in range(lengths.size):
        data, n = _record(held, record)
        held.reached[record] = whole_reference.count_reached(data, n, layout)
    return held


def unpack_whole_rows(held: HeldWhole, first: int, stop: int) -> Patterns:
    """The bit patterns of rows that all stay, from `first` to before `stop`, [stop - first, C]."""
    size, columns = held.layout.weights, held.columns
    start, end = (held.first + first) * columns, (held.first + stop) * columns
    records = range(start // size, -(-end // size))
    parts = [whole_reference.unpack_record(*_record(held, r), held.layout) for r in records]
    weights = np.concatenate([np.empty(0, np.uint64), *parts])[start - records.start * size :]
    rows: Patterns = weights[: end - start].astype(held.number_format.storage)
    return rows.reshape((stop - first, columns))


def _record(held: HeldWhole, record: int) -> tuple[Bytes, int]:
    """The bytes of a record, and how many weights it has."""
    start, end = held.offsets[record : record + 2].tolist()
    size = held.layout.weights
    return held.payload[start:end], min(size, held.weights - record * size)


def multiply_rows(held: HeldRows | HeldWhole, x: Patterns, out: Patterns, bias: Patterns) -> None:
    """See `emp_kernels.held_dispatch.multiply_rows`; a bias without items is none."""
    number_format = held.number_format
    tokens = values_of(x, number_format)
    addend = values_of(bias, number_format) if bias.size else np.zeros(held.rows)
    for r in range(held.rows):
        weights = values_of(_any_row(held, r), number_format)
        with np.errstate(invalid="ignore", over="ignore"):
            sums = (tokens @ weights + addend[r]).astype(np.float32)
        out[:, r] = rounded(sums, number_format)


def _any_row(held: HeldRows | HeldWhole, row: int) -> Patterns:
    """The bit patterns of a row, of either kind."""
    if isinstance(held, HeldWhole):
        return unpack_whole_rows(held, row, row + 1).reshape(-1)
    return unpack_row(held, row)


def values_of(patterns: Patterns, number_format: NumberFormat) -> npt.NDArray[np.float64]:
    """The numbers that bit patterns stand for, of any shape."""
    if number_format is F16:
        return patterns.view(np.float16).astype(np.float64)
    wide = patterns.astype(np.uint32) << np.uint32(number_format.to_f32_shift)
    with np.errstate(invalid="ignore"):  # a signalling NaN may become a quiet one
        return wide.view(np.float32).astype(np.float64)


def rounded(numbers: npt.NDArray[np.float32], number_format: NumberFormat) -> Patterns:
    """Numbers rounded to the nearest of a format, or the even one of two: their bit patterns."""
    if number_format is F16:
        with np.errstate(over="ignore"):
            return numbers.astype(np.float16).view(np.uint16)
    bits = numbers.view(np.uint32)
    if number_format is not BF16:
        return bits
    halves = ((bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(numbers), (bits >> 16 | 0x40).astype(np.uint16), halves)
