"""What a backend can do with row blocks.

`emp_kernels.dispatch` checks arguments, picks a backend and calls it. Every backend returns the
same bits from a method. Arguments, results and errors are documented there, at the function that
calls the method.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from emp_kernels.held import HeldRows, HeldWhole
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import NumberFormat
from emp_kernels.rows import (
    Bytes,
    Counts,
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

__all__ = ["Backend"]


class Backend(Protocol):
    """One way to compute all that `emp_kernels.dispatch` and `emp_kernels.histogram` offer.

    A backend holds the buffers that it works in, and what else only it needs: it is made for a
    call, or for many of one thread.
    """

    def pack(self, weights: Patterns, layout: RowLayout, rule: Rule, *, emit: bool) -> PackedRows:
        """See `emp_kernels.dispatch.pack_rows`."""

    def prune(
        self, weights: Patterns, number_format: NumberFormat, rule: Rule, out: Patterns
    ) -> PrunedRows:
        """See `emp_kernels.dispatch.prune_rows`."""

    def select(
        self, scores: Patterns, rule: PerRow | Threshold, kept: Counts | None
    ) -> SelectedRows:
        """See `emp_kernels.dispatch.select_rows`."""

    def unpack(
        self,
        payload: Bytes,
        sections: npt.NDArray[np.int64],
        table: Table,
        layout: RowLayout,
        out: Patterns,
    ) -> None:
        """See `emp_kernels.dispatch.unpack_rows`.

        Args:
            payload: As there, C-contiguous.
            sections: int64 [R, 4], `RowLayout.sections` of the table: their sum is the payload's
                size.
            table: As there.
            layout: As there.
            out: As there.
        """

    def pack_whole(self, weights: Patterns, layout: WholeLayout, *, emit: bool) -> WholeRecords:
        """See `emp_kernels.dispatch.pack_whole`."""

    def unpack_whole(
        self, payload: Bytes, lengths: Counts, layout: WholeLayout, out: Patterns
    ) -> None:
        """See `emp_kernels.dispatch.unpack_whole`."""

    def hold_rows(
        self, payload: Bytes, sections: npt.NDArray[np.int64], table: Table, layout: RowLayout
    ) -> HeldRows:
        """See `emp_kernels.held_dispatch.hold_rows`; arguments are as for `unpack`."""

    def multiply_rows(
        self, held: HeldRows, x: Patterns, out: Patterns, bias: Patterns, threads: int | None
    ) -> None:
        """See `emp_kernels.held_dispatch.multiply_rows`; no bias has no items."""

    def unpack_held_rows(
        self, held: HeldRows, first: int, out: Patterns, threads: int | None
    ) -> None:
        """See `emp_kernels.held_dispatch.unpack_held_rows`; as many rows as `out` has."""

    def gather_rows(self, held: HeldRows, rows: Counts, out: Patterns, threads: int | None) -> None:
        """See `emp_kernels.held_dispatch.gather_rows`."""

    def hold_whole(
        self, payload: Bytes, lengths: Counts, layout: WholeLayout, rows: int, columns: int
    ) -> HeldWhole:
        """See `emp_kernels.held_dispatch.hold_whole`."""

    def multiply_whole(
        self, held: HeldWhole, x: Patterns, out: Patterns, bias: Patterns, threads: int | None
    ) -> None:
        """See `emp_kernels.held_dispatch.multiply_whole`; no bias has no items."""

    def unpack_held_whole(
        self, held: HeldWhole, first: int, out: Patterns, threads: int | None
    ) -> None:
        """See `emp_kernels.held_dispatch.unpack_held_whole`; as many rows as `out` has."""

    def gather_whole(
        self, held: HeldWhole, rows: Counts, out: Patterns, threads: int | None
    ) -> None:
        """See `emp_kernels.held_dispatch.gather_whole`."""

    def count(
        self, weights: Patterns, number_format: NumberFormat, betas: Sequence[float]
    ) -> RowCounts:
        """See `emp_kernels.dispatch.count_rows`."""

    def sweep(self, weights: Patterns, kept: Counts, layouts: Sequence[RowLayout]) -> SweptRows:
        """See `emp_kernels.dispatch.sweep_rows`."""

    def trailing_zeros(
        self, weights: Patterns, number_format: NumberFormat, kept: Counts
    ) -> Counts:
        """See `emp_kernels.dispatch.trailing_zeros`."""

    def turn(self, matrix: Patterns, out: Patterns) -> None:
        """See `emp_kernels.dispatch.turn`."""

    def count_magnitudes(self, weights: Patterns, number_format: NumberFormat) -> MagnitudeCounts:
        """See `emp_kernels.histogram.BlockHistogram`; NaN and infinity are counted like others."""

    def count_low_parts(self, weights: Patterns, chosen_bin: int) -> Counts:
        """See `emp_kernels.histogram.count_low_parts`."""

    def count_equal(self, weights: Patterns, number_format: NumberFormat, key: int) -> int:
        """See `emp_kernels.histogram.count_equal`."""
