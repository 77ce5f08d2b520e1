"""Calls numba's kernels on whole records, with their buffers, and names what is damaged."""

import numpy as np

from emp_kernels.cpu import status
from emp_kernels.cpu.bit_steps import LANES
from emp_kernels.cpu.whole_pack import LIST_ROOM, RECORD_SLACK, pack_records
from emp_kernels.cpu.whole_unpack import unpack_records
from emp_kernels.errors import DamagedRowError
from emp_kernels.rows import Bytes, Counts, Patterns, WholeRecords, Workspace
from emp_kernels.whole_layout import MAX_LISTS, WholeLayout

__all__ = ["CpuWhole"]

_FAULTS = {
    status.BAD_LENGTH: "it is longer or shorter than its codes say",
    status.BAD_STRIPE: "a stripe has bits past its last weight",
    status.BAD_ESCAPES: "it has an escape where none is needed",
}

_NO_RECORDS = np.empty(0, np.uint8)


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
            _numbers(layout),
            _places(layout),
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
        nbytes = 8 * layout.weights
        ended, record = unpack_records(
            payload,
            lengths,
            layout.weights,
            _format_arguments(layout),
            np.array(layout.widths, np.int64),
            _numbers(layout),
            _exponents(layout),
            np.uint8(layout.symbols),
            layout.escape_bytes,
            self._simd,
            out,
            self._workspace.take("codes", layout.weights + LANES),
            self._workspace.take("places", layout.weights + LANES),
            self._workspace.take("escapes", nbytes)[:nbytes].view(np.int64),
        )
        if ended != status.DONE:
            raise DamagedRowError(int(record), _FAULTS[ended])


def _format_arguments(layout: WholeLayout) -> tuple[int, int, int, int, int]:
    """Mantissa bits, mask of an exponent, dropped bits, bits of a value, bits of a context."""
    exponent_mask = (1 << layout.exponent_bits) - 1
    mantissa = layout.number_format.mantissa_bits
    return mantissa, exponent_mask, layout.dropped_bits, layout.value_bits, layout.context_bits


def _numbers(layout: WholeLayout) -> Bytes:
    """The place of each exponent in the first list, their number for one that is not in it."""
    numbers = np.full(256, layout.symbols, np.uint8)
    numbers[list(layout.exponents[0])] = np.arange(layout.symbols)
    return numbers


def _places(layout: WholeLayout) -> Bytes:
    """By context and place in the first list, where the exponent is in the context's list."""
    places = np.full((MAX_LISTS, LIST_ROOM), layout.symbols, np.uint8)
    numbers = _numbers(layout)
    for context, exponents in enumerate(layout.exponents):
        places[context, numbers[list(exponents)]] = np.arange(layout.symbols)
    return places.reshape(-1)


def _exponents(layout: WholeLayout) -> Bytes:
    """By context and place, the exponents of the lists; zeros elsewhere."""
    exponents = np.zeros((MAX_LISTS, LIST_ROOM), np.uint8)
    exponents[: len(layout.exponents), : layout.symbols] = layout.exponents
    return exponents.reshape(-1)
