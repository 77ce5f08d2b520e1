"""The one place that chooses a backend: what the rest of emp-llm calls, whatever runs beneath.

Every function here gives the same bits from every `impl`:

    "reference"  plain numpy and Python, row by row
    "scalar"     numba, for any CPU
    "simd"       numba with vector compression, fast where the CPU has AVX-512 VBMI2
    "auto"       the fastest of them for this machine
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from emp_kernels import reference
from emp_kernels.counting import SLACK, exact_count, exact_sums
from emp_kernels.errors import DamagedRowError, NonFiniteRowError
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import NumberFormat

__all__ = [
    "Impl",
    "PackedRows",
    "PerRow",
    "PrunedRows",
    "RowFigures",
    "Threshold",
    "Workspace",
    "check_table",
    "pack_rows",
    "prune_rows",
    "resolve",
    "unpack_rows",
]

Impl = Literal["auto", "reference", "scalar", "simd"]
Patterns = npt.NDArray[np.unsignedinteger]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class PerRow:
    """Each row is a group: keep floor(beta · N_eff) of it.

    Attributes:
        beta: Multiplier of the effective number, finite and above 0.
    """

    beta: float


@dataclass(frozen=True)
class Threshold:
    """The group is larger than the block, and its threshold is known.

    Attributes:
        key: Keys above it are kept ...
        ties: ... and the first so many that equal it, in row-major order.
    """

    key: int
    ties: int


@dataclass(frozen=True)
class RowFigures:
    """What was decided for a block of rows.

    Attributes:
        table: int64 [R, 3]: weights kept, how many of them escape, base of the window. The latter
            two are 0 where rows are not packed.
        stats: float64 [R, 4]: Σs, Σs², Σ_kept s and the largest key of each row.
    """

    table: npt.NDArray[np.int64]
    stats: npt.NDArray[np.float64]


@dataclass(frozen=True)
class PackedRows(RowFigures):
    """A block of packed rows.

    Attributes:
        payload: uint8 [bytes], the records, one after the other; a view of the workspace. Empty
            where nothing was emitted.
    """

    payload: Bytes


@dataclass(frozen=True)
class PrunedRows(RowFigures):
    """A block of rows with zeros for the weights that go.

    Attributes:
        weights: uint16 or uint32 [R, C], bit patterns.
    """

    weights: Patterns


class Workspace:
    """Buffers that one thread uses again for block after block. Not for two threads at once."""

    def __init__(self) -> None:
        self._buffers: dict[str, Bytes] = {}

    def take(self, name: str, nbytes: int) -> Bytes:
        """A uint8 buffer of at least that size; what it holds is unspecified."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < nbytes:
            buffer = self._buffers[name] = np.empty(nbytes, np.uint8)
        return buffer


@cache
def resolve(impl: Impl) -> Impl:
    """The backend that runs for `impl` on this machine."""
    if impl != "auto":
        return impl
    import llvmlite.binding

    return "simd" if llvmlite.binding.get_host_cpu_features().get("avx512vbmi2") else "scalar"


def pack_rows(
    weights: Patterns,
    layout: RowLayout,
    rule: PerRow | Threshold,
    *,
    emit: bool = True,
    impl: Impl = "auto",
    workspace: Workspace | None = None,
) -> PackedRows:
    """Decide which weights of a block of rows stay, and pack them.

    Args:
        weights: uint16 or uint32 [R, C], bit patterns in the layout's format, C-contiguous.
        layout: The tensor's layout.
        rule: What to keep.
        emit: Whether to write records; without, only table and stats are made.
        impl: Backend.
        workspace: Buffers to use again; the payload lies in them.

    Raises:
        NonFiniteRowError: If a weight is NaN or infinite.
    """
    if impl == "reference":
        return _pack_rows_plainly(weights, layout, rule, emit=emit)
    block = _Block(weights, layout, rule, impl, workspace or Workspace())
    return block.pack() if emit else block.measure()


def prune_rows(
    weights: Patterns,
    number_format: NumberFormat,
    rule: PerRow | Threshold,
    *,
    out: Patterns | None = None,
    impl: Impl = "auto",
    workspace: Workspace | None = None,
) -> PrunedRows:
    """Decide which weights of a block of rows stay, and put +0.0 in the place of the others.

    Args:
        weights: uint16 or uint32 [R, C], bit patterns, C-contiguous.
        number_format: Their format.
        rule: What to keep.
        out: Where to write, as weights or weights itself; made if None.
        impl: Backend.
        workspace: Buffers to use again.

    Raises:
        NonFiniteRowError: If a weight is NaN or infinite.
    """
    out = np.empty_like(weights) if out is None else out
    layout = RowLayout(number_format=number_format, columns=weights.shape[1])
    if impl == "reference":
        packed = _pack_rows_plainly(weights, layout, rule, emit=True)
        unpack_rows(packed.payload, packed.table, layout, out=out, impl=impl)
        table = packed.table * np.array([1, 0, 0])
        return PrunedRows(table, packed.stats, out)
    return _Block(weights, layout, rule, impl, workspace or Workspace()).prune(out)


def unpack_rows(
    payload: Bytes,
    table: npt.NDArray[np.int64],
    layout: RowLayout,
    *,
    out: Patterns | None = None,
    impl: Impl = "auto",
    workspace: Workspace | None = None,
) -> Patterns:
    """Decode a block of packed rows.

    Args:
        payload: uint8 [bytes], the block's records, one after the other, and nothing else.
        table: int64 [R, 3], their lines of the row table.
        layout: The tensor's layout.
        out: uint16 or uint32 [R, C], C-contiguous, to write to; made if None.
        impl: Backend.
        workspace: Buffers to use again.

    Returns:
        The weights' bit patterns, [R, C].

    Raises:
        DamagedRowError: If a record contradicts its line of the table or itself.
    """
    check_table(table, layout)
    sections = layout.sections(table[:, 0], table[:, 1])
    if sections.sum() != payload.size:
        raise DamagedRowError(
            max(len(table) - 1, 0),
            f"the table tells of {sections.sum()} bytes, there are {payload.size}",
        )
    if out is None:
        out = np.empty((len(table), layout.columns), layout.number_format.storage)
    if impl == "reference":
        ends = np.cumsum(sections.sum(axis=1))
        for r, (kept, escaped, base) in enumerate(table.tolist()):
            record = payload[ends[r] - sections[r].sum() : ends[r]].tobytes()
            try:
                out[r] = reference.unpack_row(record, kept, escaped, base, layout)
            except ValueError as error:
                raise DamagedRowError(r, str(error)) from error
        return out
    from emp_kernels.cpu import unpack

    scratch = _scratch(layout, workspace or Workspace())
    status, row = unpack.unpack_block(
        np.ascontiguousarray(payload),
        sections,
        table,
        _format_arguments(layout.number_format),
        _layout_arguments(layout),
        resolve(impl) == "simd",
        out,
        *scratch,
    )
    if status != unpack.UNPACKED:
        faults = {
            unpack.BAD_MASK: "its mask names another number of weights than its table line",
            unpack.BAD_ESCAPES: "it marks another number of escapes than its table line",
            unpack.NOT_FINITE: "it holds NaN or infinity",
        }
        raise DamagedRowError(int(row), faults[status])
    return out


def check_table(table: npt.NDArray[np.int64], layout: RowLayout) -> None:
    """Check that each line of a row table, int64 [R, 3], is one that a row can have.

    Raises:
        DamagedRowError: If one is not.
    """
    kept, escaped, base = table[:, 0], table[:, 1], table[:, 2]
    bad = (kept < 0) | (kept > layout.columns) | (escaped < 0) | (escaped > kept)
    bad |= (base < 0) | (base > layout.number_format.key_mask >> layout.dropped_bits)
    if bad.any():
        row = int(np.argmax(bad))
        raise DamagedRowError(
            row,
            f"its table line (kept, escaped, base) = {tuple(table[row].tolist())} is impossible",
        )


class _Block:
    """One call of the CPU kernel, and another one for each count that float64 cannot decide."""

    def __init__(
        self,
        weights: Patterns,
        layout: RowLayout,
        rule: PerRow | Threshold,
        impl: Impl,
        workspace: Workspace,
    ) -> None:
        self._weights = weights
        self._layout = layout
        self._rule = rule
        self._simd = resolve(impl) == "simd"
        self._workspace = workspace
        self._table = np.empty((len(weights), 3), np.int64)
        self._stats = np.empty((len(weights), 4), np.float64)

    def pack(self) -> PackedRows:
        from emp_kernels.cpu import pack

        room = len(self._weights) * self._layout.longest_record + pack.SCRATCH_SLACK
        out = self._workspace.take("records", room)
        used = self._run(pack.RECORDS, out, self._weights)
        return PackedRows(self._table, self._stats, out[:used])

    def measure(self) -> PackedRows:
        from emp_kernels.cpu import pack

        nothing = np.empty(0, np.uint8)
        self._run(pack.NOTHING, nothing, self._weights)
        return PackedRows(self._table, self._stats, nothing)

    def prune(self, out: Patterns) -> PrunedRows:
        from emp_kernels.cpu import pack

        self._run(pack.ROWS, np.empty(0, np.uint8), out)
        return PrunedRows(self._table, self._stats, out)

    def _run(self, emit: int, out: Bytes, dense: Patterns) -> int:
        from emp_kernels.cpu import pack

        rule, number_format = self._rule, self._layout.number_format
        beta = rule.beta if isinstance(rule, PerRow) else 0.0
        threshold = (-1, 0) if isinstance(rule, PerRow) else (rule.key, rule.ties)
        start = (0, 0, -1)
        while True:
            status, row, used = pack.pack_block(
                self._weights,
                _format_arguments(number_format),
                _layout_arguments(self._layout),
                (beta * SLACK, *threshold),
                start,
                self._simd,
                emit,
                out,
                dense,
                self._table,
                self._stats,
                *_scratch(self._layout, self._workspace),
            )
            if status == pack.DONE:
                return int(used)
            if status == pack.NOT_FINITE:
                raise NonFiniteRowError(int(row))
            start = (row, used, _exact_row_count(self._weights[row], number_format, beta))


def _scratch(layout: RowLayout, workspace: Workspace) -> tuple[Patterns, Patterns, Bytes]:
    storage = layout.number_format.storage
    nbytes = (layout.columns + 64) * storage.itemsize
    kept = workspace.take("kept", nbytes)[:nbytes].view(storage)
    delta = workspace.take("delta", nbytes)[:nbytes].view(storage)
    return kept, delta, workspace.take("codes", layout.columns)


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
    keys, counts = np.unique(weights & number_format.key_mask, return_counts=True)
    terms = []
    for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
        m, e = number_format.significand(key)
        terms.append((e, count * m, count * m * m))
    return exact_count(*exact_sums(terms), weights.size, beta)


def _pack_rows_plainly(
    weights: Patterns, layout: RowLayout, rule: PerRow | Threshold, *, emit: bool
) -> PackedRows:
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
        stats.append((scores.sum(), (scores**2).sum(), scores[keep].sum(), keys.max()))
    payload = np.frombuffer(b"".join(records) if emit else b"", np.uint8)
    return PackedRows(
        np.array(table, np.int64).reshape(-1, 3),
        np.array(stats, np.float64).reshape(-1, 4),
        payload,
    )
