"""The one place that chooses a backend: what the rest of emp-llm calls, whichever runs.

Every function here checks its arguments, picks a `emp_kernels.backend.Backend` and calls it. The
result is the same bits from every `impl`:

    "reference"  plain numpy and Python, row by row
    "scalar"     numba, for any CPU
    "simd"       numba with vector compression, fast where the CPU has AVX-512 VBMI2
    "triton"     Triton, on the GPU of the workspace, or else on the first one
    "auto"       "triton" where the workspace has a GPU, else the fastest one for this CPU

`emp_kernels.held_dispatch` is the way in for packed weights that stay in memory.
"""

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Literal

import numpy as np

from emp_kernels.backend import Backend
from emp_kernels.checks import (
    check_kept,
    check_mask,
    check_payload,
    check_turned,
    check_whole,
)
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import NumberFormat
from emp_kernels.rows import (
    Bytes,
    Counts,
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
    Workspace,
)
from emp_kernels.whole_layout import WholeLayout

__all__ = [
    "Impl",
    "count_rows",
    "get_backend",
    "load_backend",
    "pack_rows",
    "pack_whole",
    "prune_rows",
    "resolve",
    "select_rows",
    "sweep_rows",
    "trailing_zeros",
    "turn",
    "unpack_rows",
    "unpack_whole",
]

Impl = Literal["auto", "reference", "scalar", "simd", "triton"]


def load_backend() -> None:
    """Import the backend for CPUs ahead of its first use, so that no timed work waits for it."""
    importlib.import_module("emp_kernels.cpu_backend")


@cache
def resolve(impl: Impl) -> Impl:
    """The `impl` that runs on this machine's CPU: "auto" is "simd" where that is fast."""
    if impl != "auto":
        return impl
    import llvmlite.binding

    return "simd" if llvmlite.binding.get_host_cpu_features().get("avx512vbmi2") else "scalar"


def get_backend(impl: Impl, workspace: Workspace | None = None) -> Backend:
    """The backend that does what is asked.

    Args:
        impl: Backend; "auto" chooses by the workspace and the CPU.
        workspace: Buffers to use again; made if None.

    Raises:
        NoDeviceError: If "triton" was asked for, and there is no GPU.
    """
    # each backend is imported when it is first used: numba and Triton take a second or more
    if impl == "reference":
        from emp_kernels.reference_backend import ReferenceBackend

        return ReferenceBackend()
    has_gpu = workspace is not None and workspace.device is not None
    if impl == "triton" or (impl == "auto" and has_gpu):
        from emp_kernels.gpu_backend import GpuBackend

        return GpuBackend.over(workspace)
    from emp_kernels.cpu_backend import CpuBackend

    return CpuBackend(workspace or Workspace(), simd=resolve(impl) == "simd")


def pack_rows(
    weights: Patterns,
    layout: RowLayout,
    rule: Rule,
    *,
    emit: bool = True,
    impl: Impl = "auto",
    workspace: Workspace | None = None,
) -> PackedRows:
    """Decide which weights of a row block stay, and pack them.

    Args:
        weights: uint16 or uint32 [R, C], bit patterns in the layout's format, C-contiguous.
        layout: The tensor's layout.
        rule: What to keep.
        emit: Whether to write records; otherwise the result has a table and stats only.
        impl: Backend.
        workspace: Buffers to use again; the payload lies in them.

    Raises:
        NonFiniteRowError: If a weight is NaN or infinite.
        ValueError: If a given mask does not fit the weights.
    """
    check_mask(weights.shape, rule)
    return get_backend(impl, workspace).pack(weights, layout, rule, emit=emit)


def prune_rows(
    weights: Patterns,
    number_format: NumberFormat,
    rule: Rule,
    *,
    out: Patterns | None = None,
    impl: Impl = "auto",
    workspace: Workspace | None = None,
) -> PrunedRows:
    """Decide which weights of a row block stay, and put +0.0 in place of the others.

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
    check_mask(weights.shape, rule)
    out = np.empty_like(weights) if out is None else out
    return get_backend(impl, workspace).prune(weights, number_format, rule, out)


def select_rows(
    scores: Patterns,
    rule: PerRow | Threshold,
    *,
    kept: Counts | None = None,
    impl: Impl = "auto",
    workspace: Workspace | None = None,
) -> SelectedRows:
    """Decide which scores of a row block stay.

    Args:
        scores: uint32 [R, C], bit patterns of float32, C-contiguous; signs are ignored.
        rule: What to keep.
        kept: int64 [R], from 0 to C: with `PerRow`, how many of each row stay, whatever β is.
        impl: Backend.
        workspace: Buffers to use again.

    Raises:
        NonFiniteRowError: If a score is NaN or infinite.
        ValueError: If `kept` has another shape, exceeds a row, or comes with a `Threshold`.
    """
    check_kept(scores.shape, rule, kept)
    return get_backend(impl, workspace).select(scores, rule, kept)


def unpack_rows(
    payload: Bytes,
    table: Table,
    layout: RowLayout,
    *,
    out: Patterns | None = None,
    impl: Impl = "auto",
    workspace: Workspace | None = None,
) -> Patterns:
    """Decode a row block.

    Args:
        payload: uint8 [bytes], the rows' records, one after the other, and nothing else.
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
    sections = check_payload(payload, table, layout)
    if out is None:
        out = np.empty((len(table), layout.columns), layout.number_format.storage)
    payload = np.ascontiguousarray(payload)
    get_backend(impl, workspace).unpack(payload, sections, table, layout, out)
    return out


def pack_whole(
    weights: Patterns,
    layout: WholeLayout,
    *,
    emit: bool = True,
    impl: Impl = "auto",
    workspace: Workspace | None = None,
) -> WholeRecords:
    """Pack weights that all stay, whatever they are: NaN, infinity and −0.0 keep their bits.

    Args:
        weights: uint16 or uint32, bit patterns in the layout's format, C-contiguous, of any shape:
            each record takes `layout.weights` of them, the last one what is left.
        layout: The tensor's layout.
        emit: Whether to write records; otherwise the result has their lengths only.
        impl: Backend; "triton" runs on the CPU.
        workspace: Buffers to use again; the payload lies in them.
    """
    return get_backend(impl, workspace).pack_whole(weights.reshape(-1), layout, emit=emit)


def unpack_whole(
    payload: Bytes,
    lengths: Counts,
    layout: WholeLayout,
    out: Patterns,
    *,
    impl: Impl = "auto",
    workspace: Workspace | None = None,
) -> None:
    """Decode whole records.

    Args:
        payload: uint8 [bytes], records, one after the other, and nothing else.
        lengths: int64 [records], bytes of each.
        layout: The tensor's layout.
        out: uint16 or uint32, C-contiguous, of any shape: the weights' bit patterns, written.
        impl: Backend; "triton" runs on the CPU.
        workspace: Buffers to use again.

    Raises:
        DamagedRowError: If a record contradicts its length or itself; its row is the record.
        ValueError: If so many records do not hold so many weights.
    """
    check_whole(payload, lengths, layout, out)
    payload = np.ascontiguousarray(payload)
    get_backend(impl, workspace).unpack_whole(payload, lengths, layout, out.reshape(-1))


def count_rows(
    weights: Patterns,
    number_format: NumberFormat,
    betas: Sequence[float],
    *,
    impl: Impl = "auto",
) -> RowCounts:
    """Count how many weights of each row stay, for many β at once.

    Args:
        weights: uint16 or uint32 [R, C], bit patterns, C-contiguous.
        number_format: Their format.
        betas: Multipliers of the effective number, above 0; infinity keeps rows whole that are not
            all zeros.
        impl: Backend; all but "reference" run the same kernel on the CPU.

    Raises:
        NonFiniteRowError: If a weight is NaN or infinite.
    """
    return get_backend(impl).count(weights, number_format, betas)


def sweep_rows(
    weights: Patterns,
    kept: Counts,
    layouts: Sequence[RowLayout],
    *,
    impl: Impl = "auto",
) -> SweptRows:
    """Measure what a row block would come to, packed, at many points at once.

    Fastest where points are sorted by the weights they keep, least first: each continues from the
    one before it.

    Args:
        weights: uint16 or uint32 [R, C], bit patterns, C-contiguous; all finite.
        kept: int64 [R, P], how many weights of each row stay at each point: 0 at all points, or 1
            to C.
        layouts: The layout at each point, P of one format.
        impl: As for `count_rows`.
    """
    return get_backend(impl).sweep(weights, kept, layouts)


def trailing_zeros(
    weights: Patterns,
    number_format: NumberFormat,
    kept: Counts,
    *,
    impl: Impl = "auto",
) -> Counts:
    """Count the kept weights, but for zeros, by the zero bits that their patterns end in.

    Args:
        weights: uint16 or uint32 [R, C], bit patterns, C-contiguous; all finite.
        number_format: Their format.
        kept: int64 [R, B], how many weights of each row stay, for B choices.
        impl: As for `count_rows`.

    Returns:
        int64 [B, 32].
    """
    return get_backend(impl).trailing_zeros(weights, number_format, kept)


def turn(matrix: Patterns, out: Patterns, *, impl: Impl = "auto") -> None:
    """Turn a matrix, so that its columns become rows.

    Args:
        matrix: uint16 or uint32 [M, N]; the items of a line lie side by side, lines may lie apart.
        out: As many of the same [N, M], likewise, in other memory; written.
        impl: As for `count_rows`.

    Raises:
        ValueError: If shapes or dtypes do not fit, or the items of a line lie apart.
    """
    check_turned(matrix, out)
    get_backend(impl).turn(matrix, out)
