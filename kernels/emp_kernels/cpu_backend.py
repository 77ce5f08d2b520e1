"""The backend of numba's kernels for CPUs: their arguments, their results, their buffers."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from emp_kernels.counting import SLACK, exact_count, exact_sums_of
from emp_kernels.cpu import histogram, masks, status
from emp_kernels.cpu import pack as packing
from emp_kernels.cpu import sweep as sweeping
from emp_kernels.cpu import turn as turning
from emp_kernels.cpu import unpack as unpacking
from emp_kernels.cpu_arguments import (
    FAULTS,
    format_arguments,
    key_mask,
    layout_arguments,
    row_scratch,
)
from emp_kernels.cpu_held import CpuHeld
from emp_kernels.errors import DamagedRowError, NonFiniteRowError
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import BINS, F32, LOW_PARTS, NumberFormat
from emp_kernels.rows import (
    Bytes,
    Counts,
    Given,
    MagnitudeCounts,
    PackedRows,
    Patterns,
    PerRow,
    PrunedRows,
    RowCounts,
    RowStatistics,
    Rule,
    SelectedRows,
    SweptRows,
    Table,
    Threshold,
    Workspace,
)

__all__ = ["CpuBackend", "CpuCounting"]

_NO_RECORDS = np.empty(0, np.uint8)


class CpuCounting(CpuHeld):
    """The part of `emp_kernels.backend.Backend` that runs on the CPU for GPUs too.

    There are no kernels of them for it.
    """

    def count(
        self, weights: Patterns, number_format: NumberFormat, betas: Sequence[float]
    ) -> RowCounts:
        """See `emp_kernels.dispatch.count_rows`."""
        stats = np.empty((len(weights), 2), np.float64)
        kept = np.empty((len(weights), len(betas)), np.int64)
        slack = np.array(betas, np.float64) * SLACK
        arguments = format_arguments(number_format)
        ended, row = sweeping.count_block(weights, arguments, slack, stats, kept)
        if ended == status.NOT_FINITE:
            raise NonFiniteRowError(int(row))
        for r, b in zip(*np.nonzero(kept < 0), strict=True):
            kept[r, b] = _exact_row_count(weights[r], number_format, betas[b])
        return RowCounts(stats, kept)

    def sweep(self, weights: Patterns, kept: Counts, layouts: Sequence[RowLayout]) -> SweptRows:
        """See `emp_kernels.dispatch.sweep_rows`."""
        by_id = {id(layout): layout for layout in layouts}  # hundreds of points share a few
        arguments = {key: layout_arguments(layout) for key, layout in by_id.items()}
        swept = SweptRows(
            np.empty(kept.shape, np.int64),
            np.empty(kept.shape, np.float64),
            np.empty(len(layouts), np.int64),
        )
        sweeping.sweep_block(
            weights,
            format_arguments(layouts[0].number_format),
            np.ascontiguousarray(kept),
            np.array([arguments[id(layout)] for layout in layouts], np.int64),
            swept.escaped,
            swept.kept_mass,
            swept.record_bytes,
        )
        return swept

    def trailing_zeros(
        self, weights: Patterns, number_format: NumberFormat, kept: Counts
    ) -> Counts:
        """See `emp_kernels.dispatch.trailing_zeros`."""
        found = np.empty((kept.shape[1], 32), np.int64)
        sweeping.trailing_zeros(
            weights, format_arguments(number_format), np.ascontiguousarray(kept), found
        )
        return found

    def turn(self, matrix: Patterns, out: Patterns) -> None:
        """See `emp_kernels.dispatch.turn`."""
        if matrix.size:
            turning.turn_lines(*_lines(matrix), *_lines(out), *matrix.shape)


class CpuBackend(CpuCounting):
    """numba's kernels for CPUs, see `emp_kernels.backend.Backend`.

    Args:
        workspace: Buffers to use again.
        simd: Whether to use vector compression: correct on any CPU, and fast where it has AVX-512
            VBMI2.
    """

    def __init__(self, workspace: Workspace, *, simd: bool) -> None:
        super().__init__(workspace, simd=simd)

    def pack(self, weights: Patterns, layout: RowLayout, rule: Rule, *, emit: bool) -> PackedRows:
        """See `emp_kernels.dispatch.pack_rows`."""
        if not emit:
            rows, _ = self._run(weights, layout, rule, packing.NOTHING, _NO_RECORDS, weights)
            return PackedRows(rows.table, rows.stats, _NO_RECORDS)
        room = len(weights) * layout.longest_record + packing.SCRATCH_SLACK
        out = self._workspace.take("records", room)
        rows, used = self._run(weights, layout, rule, packing.RECORDS, out, weights)
        return PackedRows(rows.table, rows.stats, out[:used])

    def prune(
        self, weights: Patterns, number_format: NumberFormat, rule: Rule, out: Patterns
    ) -> PrunedRows:
        """See `emp_kernels.dispatch.prune_rows`."""
        layout = RowLayout(number_format=number_format, columns=weights.shape[1])
        rows, _ = self._run(weights, layout, rule, packing.ROWS, _NO_RECORDS, out)
        return PrunedRows(rows.table, rows.stats, out)

    def _run(
        self,
        weights: Patterns,
        layout: RowLayout,
        rule: Rule,
        emit: int,
        records: Bytes,
        dense: Patterns,
    ) -> tuple[RowStatistics, int]:
        """Run the kernel over a row block.

        Args:
            weights: As for `pack`.
            layout: As for `pack`.
            rule: As for `pack`.
            emit: What to write: NOTHING, RECORDS or ROWS.
            records: For RECORDS: room for all, and SCRATCH_SLACK.
            dense: For ROWS: where they go, as weights or weights itself.

        Returns:
            What was decided, and how many bytes of records were written.
        """
        table = np.empty((len(weights), 3), np.int64)
        stats = np.empty((len(weights), 3), np.float64)
        number_format = layout.number_format
        block = weights, format_arguments(number_format), layout_arguments(layout)
        written = (
            self._simd,
            emit,
            records,
            dense,
            table,
            stats,
            *row_scratch(self._workspace, layout),
        )
        if isinstance(rule, Given):
            ended, row, used = masks.pack_given(*block, rule.mask, *written)
        else:
            # The kernel stops at a row whose count float64 cannot decide. Exact integers decide it,
            # and the kernel goes on from that row: about one row in a million costs a second call.
            arguments, start = _rule_arguments(rule), (0, 0, -1)
            ended = status.DOUBTFUL
            while ended == status.DOUBTFUL:
                ended, row, used = packing.pack_block(*block, arguments, start, *written)
                if ended == status.DOUBTFUL:
                    count = _exact_row_count(weights[row], number_format, _beta(rule))
                    start = row, used, count
        if ended == status.NOT_FINITE:
            raise NonFiniteRowError(int(row))
        return RowStatistics(table, stats), int(used)

    def select(
        self, scores: Patterns, rule: PerRow | Threshold, kept: Counts | None
    ) -> SelectedRows:
        """See `emp_kernels.dispatch.select_rows`."""
        rows, columns = scores.shape
        counts = np.full(rows, -1, np.int64) if kept is None else kept.astype(np.int64)
        mask = np.empty((rows, -(-columns // 8)), np.uint8)
        table, stats = np.empty((rows, 3), np.int64), np.empty((rows, 3))
        scratch, _, _ = row_scratch(self._workspace, RowLayout(number_format=F32, columns=columns))
        start = 0
        while True:  # goes on after counts in doubt, as in `_run`
            ended, row = masks.select_block(
                scores,
                format_arguments(F32),
                _rule_arguments(rule),
                start,
                self._simd,
                counts,
                mask,
                table,
                stats,
                scratch,
            )
            if ended == status.DONE:
                return SelectedRows(table, stats, mask)
            if ended == status.NOT_FINITE:
                raise NonFiniteRowError(int(row))
            start = int(row)
            counts[start] = _exact_row_count(scores[start], F32, _beta(rule))

    def unpack(
        self,
        payload: Bytes,
        sections: npt.NDArray[np.int64],
        table: Table,
        layout: RowLayout,
        out: Patterns,
    ) -> None:
        """See `emp_kernels.dispatch.unpack_rows`."""
        ended, row = unpacking.unpack_block(
            payload,
            sections,
            table,
            format_arguments(layout.number_format),
            layout_arguments(layout),
            self._simd,
            out,
            *row_scratch(self._workspace, layout),
        )
        if ended != status.DONE:
            raise DamagedRowError(int(row), FAULTS[ended])

    def count_magnitudes(self, weights: Patterns, number_format: NumberFormat) -> MagnitudeCounts:
        """See `emp_kernels.histogram.BlockHistogram`."""
        found = MagnitudeCounts(
            np.zeros(BINS, np.int64), np.zeros(BINS, np.uint64), np.zeros(BINS, np.uint64)
        )
        flat, mask = weights.reshape(-1), key_mask(number_format)
        if number_format is F32:
            histogram.count_bins(flat, mask, found.counts, found.low_sums, found.low_squares)
        else:
            histogram.count_keys(flat, mask, found.counts)
        return found

    def count_low_parts(self, weights: Patterns, chosen_bin: int) -> Counts:
        """See `emp_kernels.histogram.count_low_parts`."""
        counts = np.zeros(LOW_PARTS, np.int64)
        histogram.count_low_parts(weights.reshape(-1), key_mask(F32), chosen_bin, counts)
        return counts

    def count_equal(self, weights: Patterns, number_format: NumberFormat, key: int) -> int:
        """See `emp_kernels.histogram.count_equal`."""
        return int(histogram.count_equal(weights.reshape(-1), key_mask(number_format), key))


def _lines(matrix: Patterns) -> tuple[Patterns, int]:
    """All memory from the first item to the last, and how many items of it each line takes."""
    item = matrix.itemsize
    lines, width = matrix.shape
    line = width if matrix.flags.c_contiguous else matrix.strides[0] // item
    size = (lines - 1) * line + width
    return np.lib.stride_tricks.as_strided(matrix, (size,), (item,)), line


def _beta(rule: PerRow | Threshold) -> float:
    return rule.beta if isinstance(rule, PerRow) else 0.0


def _rule_arguments(rule: PerRow | Threshold) -> tuple[float, int, int]:
    threshold = (-1, 0) if isinstance(rule, PerRow) else (rule.key, rule.ties)
    return _beta(rule) * SLACK, *threshold


def _exact_row_count(weights: Patterns, number_format: NumberFormat, beta: float) -> int:
    return exact_count(*exact_sums_of(weights, number_format), weights.size, beta)
