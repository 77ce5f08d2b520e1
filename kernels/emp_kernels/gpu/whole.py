"""Launches the kernels on whole records."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from emp_kernels.gpu.multiply import PART, launch_shares
from emp_kernels.gpu.unpack_launch import tile_of_row
from emp_kernels.gpu.whole_kernel import (
    check_record,
    find_ranks,
    multiply_whole_row,
    unpack_whole_row,
)
from emp_kernels.gpu.whole_parts import LIST_ROOM
from emp_kernels.whole_layout import WholeLayout

__all__ = ["WholeThere", "check_records"]

_BLOCK = 1024
"""Bytes of a stripe that are checked at a time."""


@dataclass(frozen=True, eq=False, kw_only=True)
class WholeThere:
    """Whole records in a GPU's memory, and what the kernels are told of them.

    Attributes:
        records: uint8, whole words of four bytes.
        sections: int64 [records, tiers + 2], where values, tiers and escapes of each start.
        lists: uint8 [contexts, LIST_ROOM], the exponents by context and symbol.
        ranks: int32 [R, parts, tiers], how many weights of a record get to each tier but the first
            before each part of each row, and how many escape.
        layout: The tensor's layout.
        rows: Of the tensor, R.
        columns: Of a row.
    """

    records: torch.Tensor
    sections: torch.Tensor
    lists: torch.Tensor
    ranks: torch.Tensor
    layout: WholeLayout
    rows: int
    columns: int

    @classmethod
    def of(
        cls, records: torch.Tensor, sections: torch.Tensor, layout: WholeLayout, shape: list[int]
    ) -> "WholeThere":
        """Find the ranks of records that have been checked, of a tensor of that shape, [R, C]."""
        (rows, columns), device = shape, records.device
        lists = np.zeros((len(layout.exponents), LIST_ROOM.value), np.uint8)
        lists[:, : layout.symbols] = layout.exponents
        parts = -(-columns // PART)
        ranks = torch.zeros(rows, parts, len(layout.widths), dtype=torch.int32, device=device)
        there = cls(
            records=records,
            sections=sections,
            lists=torch.from_numpy(lists).to(device),
            ranks=ranks,
            layout=layout,
            rows=rows,
            columns=columns,
        )
        if rows:
            find_ranks[(len(sections),)](*there._arguments(), rows, columns, **there._constants())
        return there

    def unpack(self, out: torch.Tensor, first: int, rows: int, chosen: torch.Tensor | None) -> None:
        """Put on the stream the kernel that decodes rows.

        Args:
            out: int16 or int32 [rows, C], or as many rows as are chosen; its columns lie side by
                side.
            first: The row that rows are numbered from.
            rows: How many there are from there on.
            chosen: int64 [n], rows to decode; all if None. Of rows that are not there, all weights
                are NaN.
        """
        if not len(out):
            return
        unpack_whole_row[(len(out),)](
            *self._arguments(),
            chosen,
            first,
            rows,
            self.rows,
            out,
            self.columns,
            out.stride(0),
            **self._constants(),
        )

    def multiply(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        bias: torch.Tensor | None,
        first: int,
        processors: int,
    ) -> None:
        """Put products with rows on the stream: out = x · Wᵀ + bias.

        Args:
            x: int16 or int32 [T, C], patterns, contiguous.
            out: The same [T, rows], written.
            bias: The same [rows], or None.
            first: The first of the rows.
            processors: Multiprocessors of the device.
        """

        def launch(grid: tuple[int, int], sums: torch.Tensor, span: int, **options: Any) -> None:
            multiply_whole_row[grid](
                *self._arguments(),
                first,
                out.shape[1],
                self.rows,
                x,
                bias,
                sums,
                self.columns,
                len(x),
                span,
                **options,
                **self._constants(),
            )

        number_format = self.layout.number_format
        launch_shares(launch, number_format, self.columns, out, bias, processors=processors)

    def _arguments(self) -> tuple[Any, ...]:
        words = self.records.view(torch.int32)
        return self.records, words, len(words), self.sections, self.lists, self.ranks

    def _constants(self) -> dict[str, Any]:
        layout = self.layout
        return {
            "RECORD_ROWS": layout.weights // self.columns,
            "PART": PART,
            "WIDTHS": layout.widths,
            "BITS": layout.number_format.bits,
            "MANTISSA": layout.number_format.mantissa_bits,
            "DROPPED": layout.dropped_bits,
            "CONTEXT": layout.context_bits,
            "ESCAPE_BYTES": layout.escape_bytes,
            "TILE": tile_of_row(self.columns),
            "num_warps": 1,
            "enable_fp_fusion": True,
        }


def check_records(
    records: torch.Tensor, offsets: torch.Tensor, layout: WholeLayout, shape: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put on the stream the kernel that checks whole records.

    Args:
        records: uint8 on the device.
        offsets: int64 [records + 1] on the device, where each record starts, and the end.
        layout: The tensor's layout.
        shape: Of the tensor, [R, C].

    Returns:
        (sections, as for `WholeThere`; faults, uint8 [records], 0 where a record is sound).
    """
    (rows, columns), count, device = shape, len(offsets) - 1, records.device
    known = torch.zeros(256, dtype=torch.uint8)
    known[list(layout.exponents[0])] = 1
    sections = torch.zeros(count, len(layout.widths) + 2, dtype=torch.int64, device=device)
    faults = torch.zeros(count, dtype=torch.uint8, device=device)
    if count:
        check_record[(count,)](
            records,
            offsets,
            known.to(device),
            sections,
            faults,
            rows,
            columns,
            RECORD_ROWS=layout.weights // columns,
            WIDTHS=layout.widths,
            VALUE_BITS=layout.value_bits,
            EXPONENT_BITS=layout.exponent_bits,
            DROPPED=layout.dropped_bits,
            ESCAPE_BYTES=layout.escape_bytes,
            BLOCK=_BLOCK,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return sections, faults
