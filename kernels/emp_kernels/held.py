"""Packed weights that lie in memory to be multiplied from there: checked once, never unpacked.

What products need to know of the records beside the bytes themselves is found while they are
checked, and kept in small arrays.
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from emp_kernels.layout import RowLayout
from emp_kernels.numbers import NumberFormat
from emp_kernels.rows import Bytes, Counts, Patterns, Table
from emp_kernels.whole_layout import WholeLayout
from emp_kernels.whole_tables import exponents_of, short_of

__all__ = ["TAIL_SLACK", "HeldRows", "HeldWhole", "held_rows", "held_whole", "room_for_places"]

TAIL_SLACK = 512
"""Bytes that kernels may read past the end of a record."""


@dataclass(frozen=True, eq=False)
class HeldRows:
    """Pruned rows, packed; see `emp_kernels.held_dispatch.hold_rows`.

    Attributes:
        payload: uint8 [bytes], the records: the very array that was given.
        layout: Their layout.
        table: uint32 [R, 3], weights kept, how many of them escape, base of the window.
        offsets: int64 [R + 1], where each row's record starts in the payload, and the end.
        escape_starts: int64 [R + 1], where each row's escapes start in `escape_places`, and the
            end.
        escape_places: uint16 or uint32, the place of each escape among its row's kept weights; two
            bytes if all rows' lengths fit.
        tail_start: Kernels read past the end of a record, but never past the end of the payload:
            records that start here or behind it are read from a copy, ...
        tail: uint8, ... the payload from there on, and `TAIL_SLACK` zeros.
    """

    payload: Bytes
    layout: RowLayout
    table: npt.NDArray[np.uint32]
    offsets: npt.NDArray[np.int64]
    escape_starts: npt.NDArray[np.int64]
    escape_places: Patterns
    tail_start: int
    tail: Bytes

    @property
    def rows(self) -> int:
        """How many rows there are, R."""
        return len(self.table)

    @property
    def columns(self) -> int:
        """Weights of a row, C."""
        return self.layout.columns

    @property
    def number_format(self) -> NumberFormat:
        """Format of the weights."""
        return self.layout.number_format

    def part(self, first: int, stop: int) -> "HeldRows":
        """The rows from `first` to before `stop`, 0 ≤ first ≤ stop ≤ R, over the same memory."""
        return HeldRows(
            self.payload,
            self.layout,
            self.table[first:stop],
            self.offsets[first : stop + 1],
            self.escape_starts[first : stop + 1],
            self.escape_places,
            self.tail_start,
            self.tail,
        )

    @cached_property
    def arguments(self) -> npt.NDArray[np.int64]:
        """What kernels for CPUs read of this, found once: addresses, sizes, the layout's numbers.

        In the order of the constants in `emp_kernels.cpu.held_job`.
        """
        layout = self.layout
        arrays = (
            self.payload,
            self.table,
            self.offsets,
            self.escape_starts,
            self.escape_places,
            self.tail,
        )
        return np.array(
            [
                *(array.ctypes.data for array in arrays),
                self.payload.size,
                self.tail_start,
                self.tail.size,
                self.escape_places.itemsize,
                self.rows,
                layout.columns,
                layout.number_format.bits,
                layout.number_format.mantissa_bits,
                layout.dropped_bits,
                layout.radix,
                layout.digits,
                layout.align,
            ],
            np.int64,
        )

    def __getstate__(self) -> dict[str, Any]:
        """What a copy consists of: not the addresses, for its arrays lie elsewhere."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


@dataclass(frozen=True, eq=False)
class HeldWhole:
    """Rows that all stay, packed in whole records; see `emp_kernels.held_dispatch.hold_whole`.

    Attributes:
        payload: uint8 [bytes], the records: the very array that was given.
        layout: Their layout.
        columns: Weights of a row, C; a record has whole rows.
        first: Which of the rows in the records is the first one here.
        rows: How many rows there are from there on, R.
        weights: How many weights all records have; all but the last have `layout.weights`.
        offsets: int64 [records + 1], where each record starts in the payload, and the end.
        reached: int32 [records, tiers + 1], how many weights of a record get to each tier, and how
            many escape.
        tail_start: As of `HeldRows`.
        tail: The same.
    """

    payload: Bytes
    layout: WholeLayout
    columns: int
    first: int
    rows: int
    weights: int
    offsets: npt.NDArray[np.int64]
    reached: npt.NDArray[np.int32]
    tail_start: int
    tail: Bytes

    @property
    def number_format(self) -> NumberFormat:
        """Format of the weights."""
        return self.layout.number_format

    def part(self, first: int, stop: int) -> "HeldWhole":
        """The rows from `first` to before `stop`, 0 ≤ first ≤ stop ≤ R, over the same memory."""
        return replace(self, first=self.first + first, rows=stop - first)

    @cached_property
    def short(self) -> Bytes | None:
        """Tables of exponents for kernels with AVX-512, then an order of lanes that they need.

        uint8 [192]; None if they cannot decode these records.
        """
        table = short_of(self.layout)
        return None if table is None else np.concatenate([table, _order(self.number_format.bits)])

    @cached_property
    def _exponents(self) -> Bytes:
        return exponents_of(self.layout)

    @cached_property
    def arguments(self) -> npt.NDArray[np.int64]:
        """What kernels for CPUs read of this, found once: addresses, sizes, the layout's numbers.

        In the order of the constants in `emp_kernels.cpu.held_job`, of which some are of no use
        here, and then of those in `emp_kernels.cpu.whole_job`.
        """
        layout = self.layout
        return np.array(
            [
                *(self.payload.ctypes.data, 0, self.offsets.ctypes.data, 0, 0),
                self.tail.ctypes.data,
                *(self.payload.size, self.tail_start, self.tail.size, 0),
                *(self.rows, self.columns),
                *(layout.number_format.bits, layout.number_format.mantissa_bits),
                *(layout.dropped_bits, 0, 0, 0),
                *(0, 0, 0, 0, 0, 0),
                *(self.reached.ctypes.data, layout.weights, self.first),
                *(len(layout.widths), sum(w << 4 * t for t, w in enumerate(layout.widths))),
                self._exponents.ctypes.data,
                0 if self.short is None else self.short.ctypes.data,
                *(layout.value_bits, layout.context_bits, layout.symbols, layout.escape_bytes),
            ],
            np.int64,
        )

    def __getstate__(self) -> dict[str, Any]:
        """As of `HeldRows`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _order(bits: int) -> Bytes:
    """An order of 16 lanes of 32 bits, as bytes: interleaving then gives weights in their order."""
    if bits == 32:
        return np.arange(16, dtype=np.uint32).reshape(4, 4).T.reshape(-1).view(np.uint8)
    pairs = np.arange(16, dtype=np.uint32).reshape(2, 4, 2)
    return pairs.transpose(1, 0, 2).reshape(-1).view(np.uint8)


def room_for_places(table: Table, layout: RowLayout) -> Patterns:
    """Room for the places of all escapes that a row table counts."""
    dtype = np.uint16 if layout.columns <= 1 << 16 else np.uint32
    return np.empty(int(table[:, 1].sum()), dtype)


def held_rows(
    payload: Bytes,
    sections: npt.NDArray[np.int64],
    table: Table,
    layout: RowLayout,
    escape_places: Patterns,
) -> HeldRows:
    """Rows that have been checked, with all that products need to know of them.

    Args:
        payload: uint8 [bytes], C-contiguous.
        sections: int64 [R, 4], `RowLayout.sections` of the table: their sum is the payload's size.
        table: int64 [R, 3].
        layout: The rows' layout.
        escape_places: As in `HeldRows`.
    """
    starts = _starts(sections.sum(axis=1))
    return HeldRows(
        payload,
        layout,
        table.astype(np.uint32),
        starts,
        _starts(table[:, 1]),
        escape_places,
        *_tail(payload, starts),
    )


def held_whole(
    payload: Bytes, lengths: Counts, layout: WholeLayout, columns: int, weights: int
) -> HeldWhole:
    """Records of which `reached` is still to be written, while they are checked.

    Args:
        payload: uint8 [bytes], C-contiguous.
        lengths: int64 [records], the bytes of each; payload holds their sum.
        layout: The records' layout.
        columns: Weights of a row.
        weights: Weights of all records.
    """
    starts = _starts(lengths)
    return HeldWhole(
        payload,
        layout,
        columns,
        0,
        weights // columns,
        weights,
        starts,
        np.empty((lengths.size, len(layout.widths) + 1), np.int32),
        *_tail(payload, starts),
    )


def _tail(payload: Bytes, starts: npt.NDArray[np.int64]) -> tuple[int, Bytes]:
    """`tail_start` and `tail` for records that start there."""
    late = np.flatnonzero(starts[1:] > payload.size - TAIL_SLACK)
    tail_start = int(starts[late[0]]) if late.size else payload.size
    return tail_start, np.concatenate([payload[tail_start:], np.zeros(TAIL_SLACK, np.uint8)])


def _starts(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Where things of these lengths start that lie one behind the other, and where they end."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
