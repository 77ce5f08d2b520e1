"""Launches the kernels that decode packed rows."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from emp_kernels.gpu.common import tile_of
from emp_kernels.gpu.unpack_bytes import unpack_bytes_row
from emp_kernels.gpu.unpack_kernel import unpack_row
from emp_kernels.layout import RowLayout
from emp_kernels.rows import Table

__all__ = [
    "constants_of",
    "launch_checks",
    "launch_unpacking",
    "lines_of",
    "tile_of_row",
    "values_are_bytes",
]

_LARGEST_TILE = 256
"""Weights. One warp does such a tile: its scans need no barrier, and most tiles have no escape or
digits from one position only."""


def tile_of_row(columns: int) -> int:
    """Columns that the kernels on records handle at a time."""
    return tile_of(columns, _LARGEST_TILE)


def lines_of(table: Table, sections: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """What kernels are told of each row, int64 [R, LINE].

    Args:
        table: int64 [R, 3], the row table.
        sections: int64 [R, 4], the lengths of each record's sections.
    """
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sections.ravel())[:-1]])
    return np.concatenate([table, starts[: sections.size].reshape(-1, 4)], axis=1)


def constants_of(layout: RowLayout, tile: int, *, in_bytes: bool) -> dict[str, Any]:
    """The arguments known when a kernel on records is compiled, and how it is launched.

    Args:
        layout: The tensor's layout.
        tile: Columns handled at a time.
        in_bytes: Whether it is one of those that take four weights at a time.
    """
    power_of_two = layout.radix.bit_count() == 1
    room = 16 if in_bytes else 24  # bits of the fractions in `place`
    constants = {
        "DROPPED": layout.dropped_bits,
        "RADIX": layout.radix,
        "DIGITS": layout.digits,
        "DIGIT_BITS": layout.radix.bit_length() - 1 if power_of_two else 0,
        "LOWEST": 0 if power_of_two else -(-(1 << room) // layout.radix),
        "ALIGN": layout.align,
        "TILE": tile,
        "num_warps": 1,
        "enable_fp_fusion": True,
    }
    if in_bytes:
        return constants
    return {**constants, "BITS": layout.number_format.bits, "STORED": layout.stored_bits}


def values_are_bytes(layout: RowLayout) -> bool:
    """Whether the kernels of `emp_kernels.gpu.unpack_bytes` can read the records."""
    return layout.stored_bits == 7 and layout.number_format.bits == 16


def launch_unpacking(
    payload: torch.Tensor,
    end: int | None,
    lines: torch.Tensor,
    layout: RowLayout,
    out: torch.Tensor,
    *,
    faults: torch.Tensor | None = None,
    chosen: torch.Tensor | None = None,
    tile: int | None = None,
) -> None:
    """Put the kernel that decodes rows on the stream.

    Args:
        payload: uint8, the records.
        end: Words of four bytes in it; None if 32 bytes more than the records take may be read.
        lines: int64 [R, LINE], see `emp_kernels.gpu.unpack_parts.LINE`.
        layout: The tensor's layout.
        out: int16 or int32 [R, C], or as many rows as are chosen; its columns lie side by side.
        faults: uint8 [R], written: 0 where a record is sound; unchecked if None.
        chosen: int64 [n], rows to decode; all if None. Of rows that are not there, all weights are
            NaN.
        tile: Columns handled at a time, a power of two from 16; chosen if None.
    """
    rows, columns = out.shape
    if not rows:
        return
    records = payload, payload.view(torch.int32), end, lines, chosen, len(lines), out
    tile = tile or tile_of_row(columns)
    in_bytes = values_are_bytes(layout)
    constants = constants_of(layout, tile, in_bytes=in_bytes)
    if in_bytes:
        whole_words = not (columns % 2 or out.stride(0) % 2 or out.data_ptr() % 4)
        out_words = out.view(torch.int32) if whole_words else out
        unpack_bytes_row[(rows,)](
            *records,
            out_words,
            faults,
            columns,
            out.stride(0),
            WHOLE_WORDS=whole_words,
            **constants,
        )
    else:
        unpack_row[(rows,)](*records, None, faults, columns, out.stride(0), PART=tile, **constants)


def launch_checks(
    payload: torch.Tensor,
    end: int,
    lines: torch.Tensor,
    layout: RowLayout,
    starts: torch.Tensor,
    faults: torch.Tensor,
    part: int,
) -> None:
    """Put the kernel on the stream that checks rows, and finds where their parts begin.

    Args:
        payload: As for `launch_unpacking`.
        end: The same.
        lines: The same.
        layout: The same.
        starts: int32 [R, parts, 2], written: how many weights of a row are kept before each part of
            it, and how many of them escape.
        faults: uint8 [R], written: 0 where a record is sound.
        part: Columns of a part, a multiple of the tile.
    """
    if not len(lines):
        return
    constants = constants_of(layout, tile_of_row(layout.columns), in_bytes=False)
    unpack_row[(len(lines),)](
        payload,
        payload.view(torch.int32),
        end,
        lines,
        None,
        len(lines),
        None,
        starts,
        faults,
        layout.columns,
        layout.columns,
        PART=part,
        **constants,
    )
