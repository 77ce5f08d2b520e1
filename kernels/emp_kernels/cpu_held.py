"""Calls numba's kernels on packed weights that are held in memory, and checks these first."""

import numpy as np
import numpy.typing as npt

from emp_kernels.cpu import held_bf16, team
from emp_kernels.cpu import held_rows as products
from emp_kernels.cpu.avx512 import HAS_BF16
from emp_kernels.cpu.byte_planes import code_tables, digit_bits
from emp_kernels.cpu.hold import check_block
from emp_kernels.cpu.status import DONE
from emp_kernels.cpu_arguments import FAULTS, format_arguments, layout_arguments, row_scratch
from emp_kernels.cpu_whole import CpuWhole
from emp_kernels.errors import DamagedRowError
from emp_kernels.held import HeldRows, held_rows, room_for_places
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import BF16
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
        columns = held.layout.columns
        if self._simd and HAS_BF16 and _has_byte_planes(held.layout):
            room = team.scratch(held_bf16.product_room(len(x), columns, size[0]))
            worker = team.worker_address(held_bf16.multiply_bf16_rows)
            held_bf16.start_multiply_bf16(
                held.arguments, x, out, bias, _codes(held.layout), worker, room, size
            )
            return
        room = team.scratch(products.multiply_room(len(x), columns, size[0]))
        worker = team.worker_address(products.multiply_any_rows)
        products.start_multiply(held.arguments, x, out, bias, worker, room, size)

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
        columns = held.layout.columns
        if self._simd and HAS_BF16 and _has_byte_planes(held.layout):
            room = team.scratch(held_bf16.product_room(0, columns, size[0]))
            worker = team.worker_address(held_bf16.unpack_bf16_rows)
            held_bf16.start_unpack_bf16(
                held.arguments, first, rows, out, _codes(held.layout), worker, room, size
            )
            return
        room = team.scratch(products.multiply_room(0, columns, size[0]))
        worker = team.worker_address(products.unpack_any_rows)
        products.start_unpack(held.arguments, first, rows, out, worker, room, size)


def _has_byte_planes(layout: RowLayout) -> bool:
    """Whether a weight is 16 bits, and its value is a byte."""
    return layout.number_format is BF16 and layout.dropped_bits == 0


def _codes(layout: RowLayout) -> tuple[Bytes, int]:
    return code_tables(layout.radix, layout.digits), digit_bits(layout.radix)
