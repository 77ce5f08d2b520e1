"""The backend of plain numpy and Python: `reference`, row by row over a block."""

import numpy as np

from emp_kernels import reference
from emp_kernels.errors import DamagedRowError, NonFiniteRowError
from emp_kernels.layout import RowLayout
from emp_kernels.rows import Bytes, PackedRows, Patterns, PerRow, PrunedRows, Table, Threshold

__all__ = ["pack", "prune", "unpack"]


def pack(
    weights: Patterns, layout: RowLayout, rule: PerRow | Threshold, *, emit: bool
) -> PackedRows:
    """See `emp_kernels.dispatch.pack_rows`."""
    number_format = layout.number_format
    ties = rule.ties if isinstance(rule, Threshold) else 0
    records, table, stats = [], [], []
    for r, row in enumerate(weights):
        keys = (row & number_format.key_mask).astype(np.int64)
        if keys.max() >= number_format.infinity:
            raise NonFiniteRowError(r)
        scores = number_format.magnitudes(row)
        if isinstance(rule, PerRow):
            keep = reference.keep_mask(scores, rule.beta)
        else:
            tied = keys == rule.key
            keep = (keys > rule.key) | (tied & (np.cumsum(tied) <= ties))
            ties -= int((keep & tied).sum())
        *line, record = reference.pack_row(row, keep, layout)
        table.append(line)
        records.append(record)
        stats.append((scores.sum(), (scores**2).sum(), scores[keep].sum()))
    payload = np.frombuffer(b"".join(records) if emit else b"", np.uint8)
    return PackedRows(
        np.array(table, np.int64).reshape(-1, 3),
        np.array(stats, np.float64).reshape(-1, 3),
        payload,
    )


def prune(
    weights: Patterns, layout: RowLayout, rule: PerRow | Threshold, out: Patterns
) -> PrunedRows:
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
