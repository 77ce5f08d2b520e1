"""Calls numba's kernels on packed weights that are held in memory, and checks these first."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from emp_kernels.cpu import held_bf16, held_lanes, team
from emp_kernels.cpu import held_rows as products
from emp_kernels.cpu.avx512 import HAS_BF16, HAS_VBMI2
from emp_kernels.cpu.byte_planes import code_tables, digit_bits
from emp_kernels.cpu.hold import check_block
from emp_kernels.cpu.lanes import value_tables
from emp_kernels.cpu.status import DONE
from emp_kernels.cpu_arguments import FAULTS, format_arguments, layout_arguments, row_scratch
from emp_kernels.cpu_whole import CpuWhole
from emp_kernels.errors import DamagedRowError
from emp_kernels.held import HeldRows, held_rows, room_for_places
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import BF16, F16, F32
from emp_kernels.rows import Bytes, Counts, Patterns, Table

__all__ = ["CpuHeld"]

_NO_ROWS = np.empty(0, np.int64)


class CpuHeld(CpuWhole):
    """The part of `emp_kernels.backend.Backend` that multiplies from packed weights."""

    def hold_rows(
        self, payload: Bytes, sections: npt.NDArray[np.int64], table: Table, layout: RowLayout
    ) -> HeldRows:
        """See `emp_kernels.held_dispatch.hold_rows`."""
        places = room_for_places(table, layout)
        ended, row = check_block(
            payload,
            sections,
            table,
            layout.columns,
            format_arguments(layout.number_format),
            layout_arguments(layout),
            places,
            *row_scratch(self._workspace, layout),
        )
        if ended != DONE:
            raise DamagedRowError(int(row), FAULTS[ended])
        return held_rows(payload, sections, table, layout, places)

    def multiply_rows(
        self, held: HeldRows, x: Patterns, out: Patterns, bias: Patterns, threads: int | None
    ) -> None:
        """See `emp_kernels.held_dispatch.multiply_rows`."""
        size = team.team_size(threads)
        way = _way_of(held.layout, simd=self._simd)
        room = team.scratch(way.room(len(x), held.layout.columns, size[0]))
        worker = team.worker_address(way.multiply)
        way.start_multiply(held.arguments, x, out, bias, way.tables, worker, room, size)

    def unpack_held_rows(
        self, held: HeldRows, first: int, out: Patterns, threads: int | None
    ) -> None:
        """See `emp_kernels.held_dispatch.unpack_held_rows`."""
        self._unpack(held, first, _NO_ROWS, out, threads)

    def gather_rows(self, held: HeldRows, rows: Counts, out: Patterns, threads: int | None) -> None:
        """See `emp_kernels.held_dispatch.gather_rows`."""
        if rows.size:
            self._unpack(held, 0, rows, out, threads)

    def _unpack(
        self, held: HeldRows, first: int, rows: Counts, out: Patterns, threads: int | None
    ) -> None:
        size = team.team_size(threads)
        way = _way_of(held.layout, simd=self._simd)
        room = team.scratch(way.room(0, held.layout.columns, size[0]))
        worker = team.worker_address(way.unpack)
        way.start_unpack(held.arguments, first, rows, out, way.tables, worker, room, size)


class _Way(NamedTuple):
    """How held rows are multiplied and unpacked: functions and tables of `emp_kernels.cpu`."""

    room: Callable[[int, int, int], int]
    start_multiply: Callable[..., None]
    start_unpack: Callable[..., None]
    multiply: Callable[[int], None]
    unpack: Callable[[int], None]
    tables: tuple[Bytes, int, Bytes]


_PLANES = held_bf16.product_room, held_bf16.start_multiply_bf16, held_bf16.start_unpack_bf16
_LANES = held_lanes.lanes_room, held_lanes.start_multiply_lanes, held_lanes.start_unpack_lanes
_ROWS = products.multiply_room, products.start_multiply, products.start_unpack
_LANE_WORKERS = {
    BF16.code: (held_lanes.multiply_bf16_lanes, held_lanes.unpack_bf16_lanes),
    F16.code: (held_lanes.multiply_f16_lanes, held_lanes.unpack_f16_lanes),
    F32.code: (held_lanes.multiply_f32_lanes, held_lanes.unpack_f32_lanes),
}


def _way_of(layout: RowLayout, *, simd: bool) -> _Way:
    number_format = layout.number_format
    simd = simd and HAS_VBMI2
    return _way(number_format.code, number_format.bits, layout.stored_bits, layout.radix, simd=simd)


@cache
def _way(code: int, bits: int, stored_bits: int, radix: int, *, simd: bool) -> _Way:
    """The fastest way on this CPU for a number format, told by its code and bits, and a layout."""
    tables = code_tables(radix), digit_bits(radix), value_tables(stored_bits + 1, bits)
    if not simd:
        return _Way(*_ROWS, products.multiply_any_rows, products.unpack_any_rows, tables)
    if (code, stored_bits) == (BF16.code, BF16.mantissa_bits) and HAS_BF16:
        return _Way(*_PLANES, held_bf16.multiply_bf16_rows, held_bf16.unpack_bf16_rows, tables)
    return _Way(*_LANES, *_LANE_WORKERS[code], tables)
