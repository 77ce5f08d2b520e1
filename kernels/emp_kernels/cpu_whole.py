"""Calls numba's kernels on whole records, with their buffers, and names what is damaged."""

import numpy as np

from emp_kernels.cpu import held_whole as products
from emp_kernels.cpu import status, team
from emp_kernels.cpu.avx512 import HAS_BF16, HAS_VBMI2
from emp_kernels.cpu.bit_steps import LANES
from emp_kernels.cpu.whole_check import check_records
from emp_kernels.cpu.whole_pack import RECORD_SLACK, pack_records
from emp_kernels.errors import DamagedRowError
from emp_kernels.held import HeldWhole, held_whole
from emp_kernels.numbers import BF16
from emp_kernels.rows import Bytes, Counts, Patterns, WholeRecords, Workspace
from emp_kernels.whole_layout import WholeLayout
from emp_kernels.whole_tables import numbers_of, places_of

__all__ = ["CpuWhole"]

_FAULTS = {
    status.BAD_LENGTH: "it is longer or shorter than its codes say",
    status.BAD_STRIPE: "a stripe has bits past its last weight",
    status.BAD_ESCAPES: "it has an escape where none is needed",
}

_NO_RECORDS = np.empty(0, np.uint8)
_NO_ROWS = np.empty(0, np.int64)


class CpuWhole:
    """The part of `emp_kernels.backend.Backend` that packs and unpacks whole records.

    Args:
        workspace: Buffers to use again.
        simd: Whether to use instructions of AVX-512 VBMI and VBMI2, where the CPU has them.
    """

    def __init__(self, workspace: Workspace, *, simd: bool) -> None:
        self._workspace = workspace
        self._simd = simd

    def pack_whole(self, weights: Patterns, layout: WholeLayout, *, emit: bool) -> WholeRecords:
        """See `emp_kernels.dispatch.pack_whole`."""
        lengths = np.empty(layout.records(weights.size), np.int64)
        room = lengths.size * layout.longest_record + RECORD_SLACK
        out = self._workspace.take("records", room) if emit else _NO_RECORDS
        used = pack_records(
            weights,
            layout.weights,
            _format_arguments(layout),
            np.array(layout.widths, np.int64),
            numbers_of(layout),
            places_of(layout),
            np.uint8(layout.symbols),
            layout.escape_bytes,
            self._simd,
            emit,
            out,
            lengths,
            self._workspace.take("codes", layout.weights + LANES),
            self._workspace.take("places", layout.weights + LANES),
        )
        return WholeRecords(lengths, out[:used] if emit else out)

    def unpack_whole(
        self, payload: Bytes, lengths: Counts, layout: WholeLayout, out: Patterns
    ) -> None:
        """See `emp_kernels.dispatch.unpack_whole`."""
        held = self.hold_whole(payload, lengths, layout, out.size, 1)
        self._decode_whole(held, 0, _NO_ROWS, out.reshape(-1, 1), 1)

    def hold_whole(
        self, payload: Bytes, lengths: Counts, layout: WholeLayout, rows: int, columns: int
    ) -> HeldWhole:
        """See `emp_kernels.held_dispatch.hold_whole`."""
        held = held_whole(payload, lengths, layout, columns, rows * columns)
        ended, record = check_records(
            payload,
            held.tail,
            held.tail_start,
            held.offsets,
            rows * columns,
            layout.weights,
            _format_arguments(layout),
            np.array(layout.widths, np.int64),
            numbers_of(layout),
            np.uint8(layout.symbols),
            layout.escape_bytes,
            held.reached,
        )
        if ended != status.DONE:
            raise DamagedRowError(int(record), _FAULTS[ended])
        return held

    def multiply_whole(
        self, held: HeldWhole, x: Patterns, out: Patterns, bias: Patterns, threads: int | None
    ) -> None:
        """See `emp_kernels.held_dispatch.multiply_whole`."""
        words = self._simd and HAS_BF16 and held.short is not None and held.number_format is BF16
        worker = products.multiply_any_whole
        if words:
            worker = products.multiply_bf16_whole
        elif self._short(held):
            worker = products.multiply_short_whole
        size = team.team_size(threads)
        needed = products.whole_room(held.layout.weights, held.columns, len(x), size[0])
        products.start_multiply_whole(
            held.arguments,
            x,
            out,
            bias,
            team.worker_address(worker),
            words,
            self._simd,
            team.scratch(needed),
            size,
        )

    def unpack_held_whole(
        self, held: HeldWhole, first: int, out: Patterns, threads: int | None
    ) -> None:
        """See `emp_kernels.held_dispatch.unpack_held_whole`."""
        self._decode_whole(held, first, _NO_ROWS, out, threads)

    def gather_whole(
        self, held: HeldWhole, rows: Counts, out: Patterns, threads: int | None
    ) -> None:
        """See `emp_kernels.held_dispatch.gather_whole`."""
        if rows.size:
            self._decode_whole(held, 0, rows, out, threads)

    def _decode_whole(
        self, held: HeldWhole, first: int, rows: Counts, out: Patterns, threads: int | None
    ) -> None:
        worker = products.unpack_short_whole if self._short(held) else products.unpack_any_whole
        size = team.team_size(threads)
        needed = products.whole_room(held.layout.weights, held.columns, 0, size[0])
        products.start_unpack_whole(
            held.arguments,
            first,
            rows,
            out,
            team.worker_address(worker),
            self._simd,
            team.scratch(needed),
            size,
        )

    def _short(self, held: HeldWhole) -> bool:
        """Whether the kernels for AVX-512 can decode records, and may."""
        return self._simd and HAS_VBMI2 and held.short is not None


def _format_arguments(layout: WholeLayout) -> tuple[int, int, int, int, int]:
    """Mantissa bits, mask of an exponent, dropped bits, bits of a value, bits of a context."""
    exponent_mask = (1 << layout.exponent_bits) - 1
    mantissa = layout.number_format.mantissa_bits
    return mantissa, exponent_mask, layout.dropped_bits, layout.value_bits, layout.context_bits
