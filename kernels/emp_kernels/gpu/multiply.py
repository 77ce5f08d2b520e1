"""Launches the kernels that multiply packed rows with a few tokens."""

from collections.abc import Callable
from typing import Any

import torch
import triton

from emp_kernels.gpu.multiply_kernel import add_parts, multiply_bytes_row, multiply_row
from emp_kernels.gpu.unpack_launch import constants_of, tile_of_row, values_are_bytes
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import BF16, F32, NumberFormat

__all__ = ["PART", "launch_shares", "multiply"]

PART = 1024
"""Columns of the parts of a row that programs may share; a multiple of every tile."""

_PROGRAMS = 16
"""Of one warp, for each multiprocessor: with so many the latency of loads is hidden."""

_BLOCK = 256
"""Outputs that a program of `add_parts` takes."""


def multiply(
    records: torch.Tensor,
    lines: torch.Tensor,
    starts: torch.Tensor,
    layout: RowLayout,
    x: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    processors: int,
) -> None:
    """Put products on the stream: out = x · Wᵀ + bias.

    Args:
        records: uint8, whole words of four bytes.
        lines: int64 [R, LINE], see `emp_kernels.gpu.unpack_parts.LINE`.
        starts: int32 [R, parts, 2], as `launch_checks` fills it.
        layout: The tensor's layout.
        x: int16 or int32 [T, C], patterns, contiguous.
        out: The same [T, R], written.
        bias: The same [R], or None.
        processors: Multiprocessors of the device.
    """
    in_bytes = values_are_bytes(layout) and not (layout.columns % 2 or x.data_ptr() % 4)
    kernel = multiply_bytes_row if in_bytes else multiply_row

    def launch(grid: tuple[int, int], sums: torch.Tensor, span: int, **options: Any) -> None:
        kernel[grid](
            records,
            records.view(torch.int32),
            records.numel() // 4,
            lines,
            starts,
            len(lines),
            x.view(torch.int32) if in_bytes else x,
            bias,
            sums,
            layout.columns,
            len(x),
            span,
            PART=PART,
            **options,
            **constants_of(layout, tile_of_row(layout.columns), in_bytes=in_bytes),
        )

    launch_shares(launch, layout.number_format, layout.columns, out, bias, processors=processors)


def launch_shares(
    launch: Callable[..., None],
    number_format: NumberFormat,
    columns: int,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    processors: int,
) -> None:
    """Have a kernel multiply rows, as many programs for each as keep the device busy.

    Where there are few rows, several programs share one, and their sums are added by another
    kernel. How many share one depends on the device, never on what it did before.

    Args:
        launch: Puts the kernel on the stream, given the grid, the tensor of its sums, columns of a
            program, and what it has to know when it is compiled.
        number_format: Of the weights.
        columns: Of a row.
        out: Patterns [T, R], contiguous, written.
        bias: Patterns [R], or None.
        processors: Multiprocessors of the device.
    """
    tokens, rows = out.shape
    if not rows:
        return
    programs, span = _shares(rows, -(-columns // PART), processors)
    sums = out if programs == 1 else torch.empty(programs, tokens, rows, device=out.device)
    is_bf16 = None if number_format is F32 else number_format is BF16
    launch(
        (rows, programs),
        sums,
        span,
        TOKENS=triton.next_power_of_2(tokens),
        WHOLE=programs == 1,
        BF16=is_bf16,
        FULL=columns % tile_of_row(columns) == 0,
    )
    if programs > 1:
        add_parts[(triton.cdiv(out.numel(), _BLOCK),)](
            sums,
            bias,
            out,
            out.numel(),
            rows,
            programs,
            BF16=is_bf16,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )


def _shares(rows: int, parts: int, processors: int) -> tuple[int, int]:
    """How many programs share a row of so many parts, and the columns of each."""
    wanted = min(parts, -(-_PROGRAMS * processors // rows))
    each = -(-parts // wanted)
    return -(-parts // each), each * PART
