"""The one place that chooses a backend: what the rest of emp-llm calls, whatever runs beneath.

Every function here gives the same bits from every `impl`:

    "reference"  plain numpy and Python, row by row
    "scalar"     numba, for any CPU
    "simd"       numba with vector compression, fast where the CPU has AVX-512 VBMI2
    "triton"     Triton, on the GPU of the workspace, or else on the first one
    "auto"       "triton" where the workspace has a GPU, else the fastest one for this CPU
"""

import importlib
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from emp_kernels import reference_backend as plain_backend
from emp_kernels.checks import check_mask, check_payload
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
    RowFigures,
    Rule,
    SelectedRows,
    SweptRows,
    Table,
    Threshold,
    Workspace,
)

if TYPE_CHECKING:
    from emp_kernels.gpu_workspace import DeviceWorkspace

__all__ = [
    "Given",
    "Impl",
    "PackedRows",
    "PerRow",
    "PrunedRows",
    "RowCounts",
    "RowFigures",
    "Rule",
    "SelectedRows",
    "SweptRows",
    "Threshold",
    "Workspace",
    "count_rows",
    "load_backend",
    "pack_rows",
    "prune_rows",
    "resolve",
    "select_rows",
    "sweep_rows",
    "trailing_zeros",
    "turn",
    "unpack_rows",
]

Impl = Literal["auto", "reference", "scalar", "simd", "triton"]


def load_backend() -> None:
    """Import what the fastest backend needs, ahead of its first use."""
    importlib.import_module("emp_kernels.cpu_backend")


@cache
def resolve(impl: Impl) -> Impl:
    """The backend that runs for `impl` on this machine's CPU."""
    if impl != "auto":
        return impl
    import llvmlite.binding

    return "simd" if llvmlite.binding.get_host_cpu_features().get("avx512vbmi2") else "scalar"


def device_workspace(impl: Impl, workspace: Workspace | None) -> "DeviceWorkspace | None":
    """The workspace of the GPU that `impl` runs on; None where it runs on the CPU.

    Raises:
        NoDeviceError: If "triton" was asked for, and there is no GPU.
    """
    there = workspace is not None and workspace.device is not None
    if impl != "triton" and not (impl == "auto" and there):
        return None
    from emp_kernels.gpu_devices import find_devices
    from emp_kernels.gpu_workspace import DeviceWorkspace

    if isinstance(workspace, DeviceWorkspace):
        return workspace
    return DeviceWorkspace(find_devices()[0])


def pack_rows(
    weights: Patterns,
    layout: RowLayout,
    rule: Rule,
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
        ValueError: If a given mask is not one of these weights.
    """
    check_mask(weights.shape, rule)
    if impl == "reference":
        return plain_backend.pack(weights, layout, rule, emit=emit)
    if there := device_workspace(impl, workspace):
        from emp_kernels import gpu_backend as triton_backend

        return triton_backend.pack(weights, layout, rule, emit=emit, workspace=there)
    from emp_kernels import cpu_backend as numba_backend

    simd = resolve(impl) == "simd"
    block = numba_backend.Block(weights, layout, rule, simd, workspace or Workspace())
    return block.pack() if emit else block.measure()


def prune_rows(
    weights: Patterns,
    number_format: NumberFormat,
    rule: Rule,
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
    check_mask(weights.shape, rule)
    out = np.empty_like(weights) if out is None else out
    layout = RowLayout(number_format=number_format, columns=weights.shape[1])
    if impl == "reference":
        return plain_backend.prune(weights, layout, rule, out)
    if there := device_workspace(impl, workspace):
        from emp_kernels import gpu_backend as triton_backend

        return triton_backend.prune(weights, number_format, rule, out, workspace=there)
    from emp_kernels import cpu_backend as numba_backend

    simd = resolve(impl) == "simd"
    return numba_backend.Block(weights, layout, rule, simd, workspace or Workspace()).prune(out)


def select_rows(
    scores: Patterns,
    rule: PerRow | Threshold,
    *,
    kept: npt.NDArray[np.int64] | None = None,
    impl: Impl = "auto",
    workspace: Workspace | None = None,
) -> SelectedRows:
    """Decide which scores of a block of rows stay.

    Args:
        scores: uint32 [R, C], bit patterns of float32, C-contiguous; their signs are not looked at.
        rule: What to keep.
        kept: int64 [R], from 0 to C: with `PerRow`, how many of each row stay, whatever β is.
        impl: Backend.
        workspace: Buffers to use again.

    Raises:
        NonFiniteRowError: If a score is NaN or infinite.
        ValueError: If `kept` is not as it must be.
    """
    rows, columns = scores.shape
    if kept is not None and (
        isinstance(rule, Threshold)
        or kept.shape != (rows,)
        or (kept < 0).any()
        or (kept > columns).any()
    ):
        raise ValueError(f"kept goes with PerRow, and is int64 [{rows}] from 0 to {columns}")
    if impl == "reference":
        return plain_backend.select(scores, F32, rule, kept)
    if there := device_workspace(impl, workspace):
        from emp_kernels import gpu_backend as triton_backend

        return triton_backend.select(scores, rule, kept, workspace=there)
    from emp_kernels import cpu_backend as numba_backend

    simd = resolve(impl) == "simd"
    return numba_backend.select(scores, rule, kept, simd, workspace or Workspace())


def unpack_rows(
    payload: Bytes,
    table: Table,
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
    sections = check_payload(payload, table, layout)
    if out is None:
        out = np.empty((len(table), layout.columns), layout.number_format.storage)
    if impl == "reference":
        plain_backend.unpack(payload, table, layout, out)
        return out
    if there := device_workspace(impl, workspace):
        from emp_kernels import gpu_backend as triton_backend

        triton_backend.unpack(payload, table, layout, out, workspace=there)
        return out
    from emp_kernels import cpu_backend as numba_backend

    simd = resolve(impl) == "simd"
    numba_backend.unpack(payload, sections, table, layout, out, simd, workspace or Workspace())
    return out


def count_rows(
    weights: Patterns,
    number_format: NumberFormat,
    betas: Sequence[float],
    *,
    impl: Impl = "auto",
) -> RowCounts:
    """How many weights of each row stay, for many β at once.

    Args:
        weights: uint16 or uint32 [R, C], bit patterns, C-contiguous.
        number_format: Their format.
        betas: Multipliers of the effective number, above 0; infinity keeps rows whole that are not
            all zeros.
        impl: Backend; there is nothing here that "simd" would do in another way than "scalar".

    Raises:
        NonFiniteRowError: If a weight is NaN or infinite.
    """
    if impl == "reference":
        return plain_backend.count(weights, number_format, betas)
    from emp_kernels import cpu_backend as numba_backend

    return numba_backend.count(weights, number_format, betas)


def sweep_rows(
    weights: Patterns,
    kept: npt.NDArray[np.int64],
    layouts: Sequence[RowLayout],
    *,
    impl: Impl = "auto",
) -> SweptRows:
    """What a block of rows would come to, packed, at many points at once.

    Quickest where points ascend by the weights they keep, and those that keep as many follow each
    other.

    Args:
        weights: uint16 or uint32 [R, C], bit patterns, C-contiguous; all finite.
        kept: int64 [R, P], how many weights of each row stay at each point: 0 at all points, or 1
            to C.
        layouts: The layout at each point, P of one format.
        impl: As for `count_rows`.
    """
    if impl == "reference":
        return plain_backend.sweep(weights, kept, layouts)
    from emp_kernels import cpu_backend as numba_backend

    return numba_backend.sweep(weights, kept, layouts)


def trailing_zeros(
    weights: Patterns,
    number_format: NumberFormat,
    kept: npt.NDArray[np.int64],
    *,
    impl: Impl = "auto",
) -> npt.NDArray[np.int64]:
    """Count the kept weights, but for zeros, by the zero bits that their patterns end in.

    Args:
        weights: uint16 or uint32 [R, C], bit patterns, C-contiguous; all finite.
        number_format: Their format.
        kept: int64 [R, B], how many weights of each row stay, for B choices.
        impl: As for `count_rows`.

    Returns:
        int64 [B, 32].
    """
    if impl == "reference":
        return plain_backend.trailing_zeros(weights, number_format, kept)
    from emp_kernels import cpu_backend as numba_backend

    return numba_backend.trailing_zeros(weights, number_format, kept)


def turn(matrix: Patterns, out: Patterns, *, impl: Impl = "auto") -> None:
    """Turn a matrix, so that its columns become rows.

    Args:
        matrix: uint16 or uint32 [M, N]; the items of a line lie side by side, lines may lie apart.
        out: As many of the same [N, M], likewise, in other memory; written.
        impl: As for `count_rows`.

    Raises:
        ValueError: If they are not as they must be.
    """
    if out.shape != matrix.shape[::-1] or out.dtype != matrix.dtype:
        raise ValueError(
            f"{matrix.dtype} {matrix.shape} is to be turned to {out.dtype} {out.shape}; that must "
            f"be {matrix.dtype} {matrix.shape[::-1]}"
        )
    for array in (matrix, out):
        if not array.flags.c_contiguous and (
            array.strides[1] != array.itemsize
            or array.strides[0] % array.itemsize
            or array.strides[0] < array.shape[1] * array.itemsize
        ):
            raise ValueError(
                f"the items of each line must lie side by side, one line behind the other; strides "
                f"are {array.strides}"
            )
    if impl == "reference":
        plain_backend.turn(matrix, out)
        return
    from emp_kernels import cpu_backend as numba_backend

    numba_backend.turn(matrix, out)
