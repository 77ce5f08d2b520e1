"""The backend of numba's CPU kernels: their arguments, their answers, their buffers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from emp_kernels.counting import SLACK, exact_count, exact_sums_of
from emp_kernels.cpu import masks
from emp_kernels.cpu import pack as kernels
from emp_kernels.cpu import sweep as sweeping
from emp_kernels.cpu import turn as turning
from emp_kernels.cpu import unpack as unpacking
from emp_kernels.errors import DamagedRowError, NonFiniteRowError
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import F32, NumberFormat
from emp_kernels.rows import (
    Bytes,
    Given,
    PackedRows,
    Patterns,
    PerRow,
    PrunedRows,
    RowCounts,
    Rule,
    SelectedRows,
    SweptRows,
    Table,
    Threshold,
    Workspace,
)

__all__ = ["Block", "count", "select", "sweep", "trailing_zeros", "turn", "unpack"]

_FAULTS = {
    unpacking.BAD_MASK: "its mask names another number of weights than its table line",
    unpacking.BAD_ESCAPES: "it marks another number of escapes than its table line",
    unpacking.NOT_FINITE: "it holds NaN or infinity",
}


class Block:
    """One call of the CPU kernel, and another one for each count that float64 cannot decide."""

    def __init__(
        self,
        weights: Patterns,
        layout: RowLayout,
        rule: Rule,
        simd: bool,
        workspace: Workspace,
    ) -> None:
        self._weights = weights
        self._layout = layout
        self._rule = rule
        self._simd = simd
        self._workspace = workspace
        self._table = np.empty((len(weights), 3), np.int64)
        self._stats = np.empty((len(weights), 3), np.float64)

    def pack(self) -> PackedRows:
        """See `emp_kernels.dispatch.pack_rows`."""
        room = len(self._weights) * self._layout.longest_record + kernels.SCRATCH_SLACK
        out = self._workspace.take("records", room)
        used = self._run(kernels.RECORDS, out, self._weights)
        return PackedRows(self._table, self._stats, out[:used])

    def measure(self) -> PackedRows:
        """The same without records."""
        nothing = np.empty(0, np.uint8)
        self._run(kernels.NOTHING, nothing, self._weights)
        return PackedRows(self._table, self._stats, nothing)

    def prune(self, out: Patterns) -> PrunedRows:
        """See `emp_kernels.dispatch.prune_rows`."""
        self._run(kernels.ROWS, np.empty(0, np.uint8), out)
        return PrunedRows(self._table, self._stats, out)

    def _run(self, emit: int, out: Bytes, dense: Patterns) -> int:
        rule, number_format = self._rule, self._layout.number_format
        if isinstance(rule, Given):
            return self._run_given(rule, emit, out, dense)
        start = (0, 0, -1)
        while True:
            status, row, used = kernels.pack_block(
                self._weights,
                _format_arguments(number_format),
                _layout_arguments(self._layout),
                _rule_arguments(rule),
                start,
                self._simd,
                emit,
                out,
                dense,
                self._table,
                self._stats,
                *_scratch(self._layout, self._workspace),
            )
            if status == kernels.DONE:
                return int(used)
            if status == kernels.NOT_FINITE:
                raise NonFiniteRowError(int(row))
            start = (row, used, _exact_row_count(self._weights[row], number_format, _beta(rule)))

    def _run_given(self, rule: Given, emit: int, out: Bytes, dense: Patterns) -> int:
        status, row, used = masks.pack_given(
            self._weights,
            _format_arguments(self._layout.number_format),
            _layout_arguments(self._layout),
            rule.mask,
            self._simd,
            emit,
            out,
            dense,
            self._table,
            self._stats,
            *_scratch(self._layout, self._workspace),
        )
        if status == kernels.NOT_FINITE:
            raise NonFiniteRowError(int(row))
        return int(used)


def select(
    scores: Patterns,
    rule: PerRow | Threshold,
    kept: npt.NDArray[np.int64] | None,
    simd: bool,
    workspace: Workspace,
) -> SelectedRows:
    """See `emp_kernels.dispatch.select_rows`."""
    rows, columns = scores.shape
    counts = np.full(rows, -1, np.int64) if kept is None else kept.astype(np.int64)
    mask = np.empty((rows, -(-columns // 8)), np.uint8)
    table, stats = np.empty((rows, 3), np.int64), np.empty((rows, 3))
    scratch, _, _ = _scratch(RowLayout(number_format=F32, columns=columns), workspace)
    start = 0
    while True:
        status, row = masks.select_block(
            scores,
            _format_arguments(F32),
            _rule_arguments(rule),
            start,
            simd,
            counts,
            mask,
            table,
            stats,
            scratch,
        )
        if status == kernels.DONE:
            return SelectedRows(table, stats, mask)
        if status == kernels.NOT_FINITE:
            raise NonFiniteRowError(int(row))
        start = int(row)
        counts[start] = _exact_row_count(scores[start], F32, _beta(rule))


def unpack(
    payload: Bytes,
    sections: npt.NDArray[np.int64],
    table: Table,
    layout: RowLayout,
    out: Patterns,
    simd: bool,
    workspace: Workspace,
) -> None:
    """See `emp_kernels.dispatch.unpack_rows`."""
    status, row = unpacking.unpack_block(
        np.ascontiguousarray(payload),
        sections,
        table,
        _format_arguments(layout.number_format),
        _layout_arguments(layout),
        simd,
        out,
        *_scratch(layout, workspace),
    )
    if status != unpacking.UNPACKED:
        raise DamagedRowError(int(row), _FAULTS[status])


def count(weights: Patterns, number_format: NumberFormat, betas: Sequence[float]) -> RowCounts:
    """See `emp_kernels.dispatch.count_rows`."""
    stats = np.empty((len(weights), 2), np.float64)
    kept = np.empty((len(weights), len(betas)), np.int64)
    slack = np.array(betas, np.float64) * SLACK
    arguments = _format_arguments(number_format)
    status, row = sweeping.count_block(weights, arguments, slack, stats, kept)
    if status == sweeping.NOT_FINITE:
        raise NonFiniteRowError(int(row))
    for r, b in zip(*np.nonzero(kept < 0), strict=True):
        kept[r, b] = _exact_row_count(weights[r], number_format, betas[b])
    return RowCounts(stats, kept)


def sweep(
    weights: Patterns, kept: npt.NDArray[np.int64], layouts: Sequence[RowLayout]
) -> SweptRows:
    """See `emp_kernels.dispatch.sweep_rows`."""
    by_id = {id(layout): layout for layout in layouts}  # hundreds of points share a few
    arguments = {key: _layout_arguments(layout) for key, layout in by_id.items()}
    swept = SweptRows(
        np.empty(kept.shape, np.int64),
        np.empty(kept.shape, np.float64),
        np.empty(len(layouts), np.int64),
    )
    sweeping.sweep_block(
        weights,
        _format_arguments(layouts[0].number_format),
        np.ascontiguousarray(kept),
        np.array([arguments[id(layout)] for layout in layouts], np.int64),
        swept.escaped,
        swept.kept_mass,
        swept.record_bytes,
    )
    return swept


def trailing_zeros(
    weights: Patterns, number_format: NumberFormat, kept: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """See `emp_kernels.dispatch.trailing_zeros`."""
    found = np.empty((kept.shape[1], 32), np.int64)
    sweeping.trailing_zeros(
        weights, _format_arguments(number_format), np.ascontiguousarray(kept), found
    )
    return found


def turn(matrix: Patterns, out: Patterns) -> None:
    """See `emp_kernels.dispatch.turn`."""
    if matrix.size:
        turning.turn_lines(*_lines(matrix), *_lines(out), *matrix.shape)


def _lines(matrix: Patterns) -> tuple[Patterns, int]:
    """All memory from the first item to the last, and how many items of it each line takes."""
    item = matrix.itemsize
    lines, width = matrix.shape
    line = width if matrix.flags.c_contiguous else matrix.strides[0] // item
    size = (lines - 1) * line + width
    return np.lib.stride_tricks.as_strided(matrix, (size,), (item,)), line


def _scratch(layout: RowLayout, workspace: Workspace) -> tuple[Patterns, Patterns, Bytes]:
    storage = layout.number_format.storage
    nbytes = (layout.columns + kernels.SCRATCH_SLACK) * storage.itemsize
    kept = workspace.take("kept", nbytes)[:nbytes].view(storage)
    delta = workspace.take("delta", nbytes)[:nbytes].view(storage)
    return kept, delta, workspace.take("codes", layout.columns)


def _beta(rule: PerRow | Threshold) -> float:
    return rule.beta if isinstance(rule, PerRow) else 0.0


def _rule_arguments(rule: PerRow | Threshold) -> tuple[float, int, int]:
    threshold = (-1, 0) if isinstance(rule, PerRow) else (rule.key, rule.ties)
    return _beta(rule) * SLACK, *threshold


def _format_arguments(number_format: NumberFormat) -> tuple[Any, ...]:
    return (
        number_format.storage.type(number_format.key_mask),
        number_format.infinity,
        number_format.bits,
        number_format.to_f32_shift,
        number_format.to_f32_scale,
    )


def _layout_arguments(layout: RowLayout) -> tuple[int, ...]:
    return (
        layout.dropped_bits,
        layout.stored_bits,
        layout.radix,
        layout.digits,
        layout.limit,
        layout.align,
    )


def _exact_row_count(weights: Patterns, number_format: NumberFormat, beta: float) -> int:
    return exact_count(*exact_sums_of(weights, number_format), weights.size, beta)
