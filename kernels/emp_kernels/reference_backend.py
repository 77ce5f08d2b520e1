"""The backend of plain numpy and Python: `reference`, row by row over a block."""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from emp_kernels import reference
from emp_kernels.errors import DamagedRowError, NonFiniteRowError
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import NumberFormat
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
)

__all__ = ["count", "pack", "prune", "select", "sweep", "trailing_zeros", "turn", "unpack"]


def pack(weights: Patterns, layout: RowLayout, rule: Rule, *, emit: bool) -> PackedRows:
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


def _decide(
    weights: Patterns,
    number_format: NumberFormat,
    rule: Rule,
    kept: npt.NDArray[np.int64] | None,
) -> Iterator[tuple[Patterns, npt.NDArray[np.bool_], tuple[float, float, float]]]:
    """Each row, bool [C] which of it stays, and (Σs, Σs², Σ_kept s)."""
    ties = rule.ties if isinstance(rule, Threshold) else 0
    for r, row in enumerate(weights):
        keys = (row & number_format.key_mask).astype(np.int64)
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
            keep = np.zeros(row.size, np.bool_)
            keep[np.argsort(-scores, kind="stable")[: kept[r]]] = True
        yield row, keep, (scores.sum(), (scores**2).sum(), scores[keep].sum())


def select(
    scores: Patterns,
    number_format: NumberFormat,
    rule: PerRow | Threshold,
    kept: npt.NDArray[np.int64] | None,
) -> SelectedRows:
    """See `emp_kernels.dispatch.select_rows`."""
    mask = np.zeros((len(scores), -(-scores.shape[1] // 8)), np.uint8)
    table = np.zeros((len(scores), 3), np.int64)
    stats = np.zeros((len(scores), 3))
    for r, (_, keep, sums) in enumerate(_decide(scores, number_format, rule, kept)):
        mask[r] = np.packbits(keep, bitorder="little")
        table[r, 0] = keep.sum()
        stats[r] = sums
    return SelectedRows(table, stats, mask)


def prune(weights: Patterns, layout: RowLayout, rule: Rule, out: Patterns) -> PrunedRows:
    """See `emp_kernels.dispatch.prune_rows`."""
    packed = pack(weights, layout, rule, emit=True)
    unpack(packed.payload, packed.table, layout, out)
    return PrunedRows(packed.table * np.array([1, 0, 0]), packed.stats, out)


def unpack(payload: Bytes, table: Table, layout: RowLayout, out: Patterns) -> None:
    """See `emp_kernels.dispatch.unpack_rows`."""
    ends = layout.offsets(table[:, 0], table[:, 1])
    for r, (kept, escaped, base) in enumerate(table.tolist()):
        record = payload[ends[r] : ends[r + 1]].tobytes()
        try:
            out[r] = reference.unpack_row(record, kept, escaped, base, layout)
        except ValueError as error:
            raise DamagedRowError(r, str(error)) from error


def count(weights: Patterns, number_format: NumberFormat, betas: Sequence[float]) -> RowCounts:
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


def sweep(
    weights: Patterns, kept: npt.NDArray[np.int64], layouts: Sequence[RowLayout]
) -> SweptRows:
    """See `emp_kernels.dispatch.sweep_rows`."""
    escaped = np.zeros(kept.shape, np.int64)
    mass = np.zeros(kept.shape)
    record_bytes = np.zeros(len(layouts), np.int64)
    for r, row in enumerate(weights):
        for p, layout in enumerate(layouts):
            scores = layout.number_format.magnitudes(row)
            keep = np.zeros(row.size, np.bool_)
            keep[np.argsort(-scores, kind="stable")[: kept[r, p]]] = True
            _, escaped[r, p], _, record = reference.pack_row(row, keep, layout)
            mass[r, p] = scores[keep].sum()
            record_bytes[p] += len(record)
    return SweptRows(escaped, mass, record_bytes)


def trailing_zeros(
    weights: Patterns, number_format: NumberFormat, kept: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """See `emp_kernels.dispatch.trailing_zeros`."""
    found = np.zeros((kept.shape[1], 32), np.int64)
    for row, counts in zip(weights, kept, strict=True):
        keys = sorted((int(bits) & number_format.key_mask for bits in row), reverse=True)
        for b, k in enumerate(counts):
            for key in filter(None, keys[:k]):
                found[b, (key & -key).bit_length() - 1] += 1
    return found


def turn(matrix: Patterns, out: Patterns) -> None:
    """See `emp_kernels.dispatch.turn`."""
    out[:] = matrix.T
