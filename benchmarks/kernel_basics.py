"""What the benchmarks of the kernels share: the rule, layouts, the authors' way, and the proof."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import NumberFormat
from emp_kernels.rows import PerRow

__all__ = ["RULE", "agree", "authors_way", "check_authors_counts", "row_layout"]

RULE = PerRow(1.0)

_LONG_ROW = 2048
"""From so many columns on `emp-llm prune` aligns the sections of a record to 16 bytes."""


def row_layout(number_format: NumberFormat, columns: int) -> RowLayout:
    """A layout such as `emp-llm prune` writes rows in."""
    align = 16 if columns >= _LONG_ROW else 1
    return RowLayout(number_format=number_format, columns=columns, align=align)


def agree(kernel: str, impl: str, found: npt.ArrayLike, expected: npt.ArrayLike) -> None:
    """End here where a kernel is wrong: its speed means nothing then.

    Raises:
        AssertionError: If the two differ.
    """
    if not np.array_equal(found, expected):
        raise AssertionError(f"{kernel} {impl} differs from the reference")


def authors_way(weights: torch.Tensor) -> torch.Tensor:
    """The rule as one writes it in torch: shares, effective number, sort, zeros put in place."""
    scores = weights.abs().float()
    shares = scores / scores.sum(dim=1, keepdim=True)
    kept = (1 / (shares * shares).sum(dim=1, keepdim=True)).floor()
    order = scores.sort(dim=1, descending=True).indices
    goes = torch.arange(weights.shape[1], device=weights.device) >= kept
    return weights.masked_fill(torch.zeros_like(goes).scatter_(1, order, goes), 0)


def check_authors_counts(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    """Check that both keep as many weights of each row, or one more or less.

    The authors' sums are float32's, so that the floor of N_eff may be another one.

    Args:
        theirs: [R, C], pruned as the authors do it.
        ours: [R, C], pruned by the kernels.

    Raises:
        AssertionError: If the counts of a row differ by more than one.
    """
    counts = theirs.count_nonzero(dim=1) - ours.count_nonzero(dim=1)
    if int(counts.abs().max()) > 1:
        raise AssertionError("the authors' way keeps other counts of weights")
