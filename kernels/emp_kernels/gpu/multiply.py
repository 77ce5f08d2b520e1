"""Launches the kernels that multiply packed rows with a few tokens."""

import torch
import triton

from emp_kernels.gpu.multiply_kernel import add_parts, multiply_bytes_row, multiply_row
from emp_kernels.gpu.unpack_launch import constants_of, tile_of_row, values_are_bytes
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import BF16, F32

__all__ = ["multiply"]

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
    part: int,
    processors: int,
) -> None:
    """Put products on the stream: out = x · Wᵀ + bias.

    Where there are few rows, several programs share one, and their sums are added by another
    kernel. How many share one depends on the device, never on what it did before.

    Args:
        records: uint8, whole words of four bytes.
        lines: int64 [R, LINE], see `emp_kernels.gpu.unpack_parts.LINE`.
        starts: int32 [R, parts, 2], as `launch_checks` fills it.
        layout: The tensor's layout.
        x: int16 or int32 [T, C], patterns, contiguous.
        out: The same [T, R], written.
        bias: The same [R], or None.
        part: Columns of a part.
        processors: Multiprocessors of the device.
    """
    tokens, rows = out.shape
    if not rows:
        return
    programs, span = _shares(rows, starts.shape[1], part, processors)
    sums = out if programs == 1 else torch.empty(programs, tokens, rows, device=out.device)
    in_bytes = values_are_bytes(layout) and not (layout.columns % 2 or x.data_ptr() % 4)
    kernel = multiply_bytes_row if in_bytes else multiply_row
    is_bf16 = None if layout.number_format is F32 else layout.number_format is BF16
    kernel[(rows, programs)](
        records,
        records.view(torch.int32),
        records.numel() // 4,
        lines,
        starts,
        rows,
        x.view(torch.int32) if in_bytes else x,
        bias,
        sums,
        layout.columns,
        tokens,
        span,
        PART=part,
        TOKENS=triton.next_power_of_2(tokens),
        WHOLE=programs == 1,
        BF16=is_bf16,
        FULL=layout.columns % tile_of_row(layout.columns) == 0,
        **constants_of(layout, tile_of_row(layout.columns), in_bytes=in_bytes),
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


def _shares(rows: int, parts: int, part: int, processors: int) -> tuple[int, int]:
    """How many programs share a row, and the columns of each."""
    wanted = min(parts, -(-_PROGRAMS * processors // rows))
    each = -(-parts // wanted)
    return -(-parts // each), each * part
