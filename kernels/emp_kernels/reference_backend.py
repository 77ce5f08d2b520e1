"""The backend of plain numpy and Python: `reference`, row by row over a row block."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from emp_kernels import held_reference, reference, whole_reference
from emp_kernels.errors import DamagedRowError, NonFiniteRowError
from emp_kernels.held import HeldRows, HeldWhole
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
    Rule,
    SelectedRows,
    SweptRows,
    Table,
    Threshold,
    WholeRecords,
)
from emp_kernels.whole_layout import WholeLayout

__all__ = ["ReferenceBackend"]


class ReferenceBackend:
    """Plain numpy and Python, see `emp_kernels.backend.Backend`: slow, and easy to read."""

    def pack(self, weights: Patterns, layout: RowLayout, rule: Rule, *, emit: bool) -> PackedRows:
        """See `emp_kernels.dispatch.pack_rows`."""
        records, table, stats = [], [], []
        for row, keep, sums in _decide(weights, layout.number_format, rule, None):
            *line, record = reference.pack_row(row, keep, layout)
            table.append(line)
            records.append(record)
            stats.append(sums)
        payload = np.frombuffer(b"".join(records) if emit else b"", np.uint8)
        return PackedRows(
            np.array(table, np.int64).reshape(-1, 3),
            np.array(stats, np.float64).reshape(-1, 3),
            payload,
        )

    def prune(
        self, weights: Patterns, number_format: NumberFormat, rule: Rule, out: Patterns
    ) -> PrunedRows:
        """See `emp_kernels.dispatch.prune_rows`."""
        table = np.zeros((len(weights), 3), np.int64)
        stats = np.zeros((len(weights), 3))
        for r, (row, keep, sums) in enumerate(_decide(weights, number_format, rule, None)):
            out[r] = np.where(keep, row, 0)
            table[r, 0] = keep.sum()
            stats[r] = sums
        return PrunedRows(table, stats, out)

    def select(
        self, scores: Patterns, rule: PerRow | Threshold, kept: Counts | None
    ) -> SelectedRows:
        """See `emp_kernels.dispatch.select_rows`."""
        mask = np.zeros((len(scores), -(-scores.shape[1] // 8)), np.uint8)
        table = np.zeros((len(scores), 3), np.int64)
        stats = np.zeros((len(scores), 3))
        for r, (_, keep, sums) in enumerate(_decide(scores, F32, rule, kept)):
            mask[r] = np.packbits(keep, bitorder="little")
            table[r, 0] = keep.sum()
            stats[r] = sums
        return SelectedRows(table, stats, mask)

    def unpack(
        self,
        payload: Bytes,
        sections: npt.NDArray[np.int64],
        table: Table,
        layout: RowLayout,
        out: Patterns,
    ) -> None:
        """See `emp_kernels.dispatch.unpack_rows`."""
        ends = np.cumsum(sections.sum(axis=1)).tolist()
        for r, (kept, escaped, base) in enumerate(table.tolist()):
            record = payload[ends[r - 1] if r else 0 : ends[r]].tobytes()
            try:
                out[r] = reference.unpack_row(record, kept, escaped, base, layout)
            except ValueError as error:
                raise DamagedRowError(r, str(error)) from error

    def pack_whole(self, weights: Patterns, layout: WholeLayout, *, emit: bool) -> WholeRecords:
        """See `emp_kernels.dispatch.pack_whole`."""
        payload, lengths = whole_reference.pack_whole(weights, layout)
        return WholeRecords(lengths, payload if emit else payload[:0])

    def unpack_whole(
        self, payload: Bytes, lengths: Counts, layout: WholeLayout, out: Patterns
    ) -> None:
        """See `emp_kernels.dispatch.unpack_whole`."""
        whole_reference.unpack_whole(payload, lengths, layout, out)

    def hold_rows(
        self, payload: Bytes, sections: npt.NDArray[np.int64], table: Table, layout: RowLayout
    ) -> HeldRows:
        """See `emp_kernels.held_dispatch.hold_rows`."""
        out = np.empty((len(table), layout.columns), layout.number_format.storage)
        self.unpack(payload, sections, table, layout, out)
        return held_reference.hold_rows(payload, sections, table, layout)

    def multiply_rows(
        self,
        held: HeldRows,
        x: Patterns,
        out: Patterns,
        bias: Patterns,
        threads: int | None,  # noqa: ARG002 (one is enough)
    ) -> None:
        """See `emp_kernels.held_dispatch.multiply_rows`."""
        held_reference.multiply_rows(held, x, out, bias)

    def unpack_held_rows(
        self,
        held: HeldRows,
        first: int,
        out: Patterns,
        threads: int | None,  # noqa: ARG002 (one is enough)
    ) -> None:
        """See `emp_kernels.held_dispatch.unpack_held_rows`."""
        for i in range(len(out)):
            out[i] = held_reference.unpack_row(held, first + i)

    def gather_rows(
        self,
        held: HeldRows,
        rows: Counts,
        out: Patterns,
        threads: int | None,  # noqa: ARG002 (one is enough)
    ) -> None:
        """See `emp_kernels.held_dispatch.gather_rows`."""
        for i, row in enumerate(rows):
            out[i] = held_reference.unpack_row(held, int(row))

    def hold_whole(
        self, payload: Bytes, lengths: Counts, layout: WholeLayout, rows: int, columns: int
    ) -> HeldWhole:
        """See `emp_kernels.held_dispatch.hold_whole`."""
        out = np.empty(rows * columns, layout.number_format.storage)
        self.unpack_whole(payload, lengths, layout, out)
        return held_reference.hold_whole(payload, lengths, layout, rows, columns)

    def multiply_whole(
        self,
        held: HeldWhole,
        x: Patterns,
        out: Patterns,
        bias: Patterns,
        threads: int | None,  # noqa: ARG002 (one is enough)
    ) -> None:
        """See `emp_kernels.held_dispatch.multiply_whole`."""
        held_reference.multiply_rows(held, x, out, bias)

    def unpack_held_whole(
        self,
        held: HeldWhole,
        first: int,
        out: Patterns,
        threads: int | None,  # noqa: ARG002 (one is enough)
    ) -> None:
        """See `emp_kernels.held_dispatch.unpack_held_whole`."""
        out[:] = held_reference.unpack_whole_rows(held, first, first + len(out))

    def gather_whole(
        self,
        held: HeldWhole,
        rows: Counts,
        out: Patterns,
        threads: int | None,  # noqa: ARG002 (one is enough)
    ) -> None:
        """See `emp_kernels.held_dispatch.gather_whole`."""
        for i, row in enumerate(rows):
            out[i] = held_reference.unpack_whole_rows(held, int(row), int(row) + 1)

    def count(
        self, weights: Patterns, number_format: NumberFormat, betas: Sequence[float]
    ) -> RowCounts:
        """See `emp_kernels.dispatch.count_rows`."""
        stats = np.empty((len(weights), 2))
        kept = np.empty((len(weights), len(betas)), np.int64)
        for r, row in enumerate(weights):
            if (row & number_format.key_mask).max() >= number_format.infinity:
                raise NonFiniteRowError(r)
            scores = number_format.magnitudes(row)
            stats[r] = scores.sum(), (scores**2).sum()
            kept[r] = [reference.keep_count(scores, beta) for beta in betas]
        return RowCounts(stats, kept)

    def sweep(self, weights: Patterns, kept: Counts, layouts: Sequence[RowLayout]) -> SweptRows:
        """See `emp_kernels.dispatch.sweep_rows`."""
        escaped = np.zeros(kept.shape, np.int64)
        mass = np.zeros(kept.shape)
        record_bytes = np.zeros(len(layouts), np.int64)
        for r, row in enumerate(weights):
            for p, layout in enumerate(layouts):
                scores = layout.number_format.magnitudes(row)
                keep = _largest(scores, kept[r, p])
                _, escaped[r, p], _, record = reference.pack_row(row, keep, layout)
                mass[r, p] = scores[keep].sum()
                record_bytes[p] += len(record)
        return SweptRows(escaped, mass, record_bytes)

    def trailing_zeros(
        self, weights: Patterns, number_format: NumberFormat, kept: Counts
    ) -> Counts:
        """See `emp_kernels.dispatch.trailing_zeros`."""
        found = np.zeros((kept.shape[1], 32), np.int64)
        for row, counts in zip(weights, kept, strict=True):
            keys = sorted((int(bits) & number_format.key_mask for bits in row), reverse=True)
            for b, k in enumerate(counts):
                for key in filter(None, keys[:k]):
                    found[b, (key & -key).bit_length() - 1] += 1
        return found

    def turn(self, matrix: Patterns, out: Patterns) -> None:
        """See `emp_kernels.dispatch.turn`."""
        out[:] = matrix.T

    def count_magnitudes(self, weights: Patterns, number_format: NumberFormat) -> MagnitudeCounts:
        """See `emp_kernels.histogram.BlockHistogram`."""
        keys = _keys(weights, number_format)
        low_sums, low_squares = np.zeros(BINS, np.uint64), np.zeros(BINS, np.uint64)
        if number_format is not F32:
            return MagnitudeCounts(np.bincount(keys, minlength=BINS), low_sums, low_squares)
        bins, low = keys >> 16, (keys & 0xFFFF).astype(np.uint64)
        np.add.at(low_sums, bins, low)
        np.add.at(low_squares, bins, low * low)
        return MagnitudeCounts(np.bincount(bins, minlength=BINS), low_sums, low_squares)

    def count_low_parts(self, weights: Patterns, chosen_bin: int) -> Counts:
        """See `emp_kernels.histogram.count_low_parts`."""
        keys = _keys(weights, F32)
        return np.bincount(keys[keys >> 16 == chosen_bin] & 0xFFFF, minlength=LOW_PARTS)

    def count_equal(self, weights: Patterns, number_format: NumberFormat, key: int) -> int:
        """See `emp_kernels.histogram.count_equal`."""
        return int((_keys(weights, number_format) == key).sum())


def _keys(weights: Patterns, number_format: NumberFormat) -> Counts:
    """The keys of weights as int64, flat."""
    return (weights & number_format.key_mask).astype(np.int64).ravel()


def _largest(scores: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.bool_]:
    """Which of a row's scores are the largest `count`, the earlier of equal ones first."""
    keep = np.zeros(scores.size, np.bool_)
    keep[np.argsort(-scores, kind="stable")[:count]] = True
    return keep


def _decide(
    weights: Patterns,
    number_format: NumberFormat,
    rule: Rule,
    kept: Counts | None,
) -> Iterator[tuple[Patterns, npt.NDArray[np.bool_], tuple[float, float, float]]]:
    """Each row, bool [C] which of it stays, and (Σs, Σs², Σ_kept s)."""
    ties = rule.ties if isinstance(rule, Threshold) else 0
    for r, row in enumerate(weights):
        keys = _keys(row, number_format)
        if keys.max() >= number_format.infinity:
            raise NonFiniteRowError(r)
        scores = number_format.magnitudes(row)
        if isinstance(rule, Given):
            keep = np.unpackbits(rule.mask[r], count=row.size, bitorder="little").astype(np.bool_)
        elif isinstance(rule, Threshold):
            tied = keys == rule.key
            keep = (keys > rule.key) | (tied & (np.cumsum(tied) <= ties))
            ties -= int((keep & tied).sum())
        elif kept is None:
            keep = reference.keep_mask(scores, rule.beta)
        else:
            keep = _largest(scores, kept[r])
        yield row, keep, (scores.sum(), (scores**2).sum(), scores[keep].sum())
