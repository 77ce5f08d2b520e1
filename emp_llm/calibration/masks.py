"""The mask of one matrix from its scores, by the rule.

Scores are float32, finite and not negative. The bit patterns of such numbers, read as integers, are
in the order of the numbers themselves, so the kernels that rank weights by magnitude rank scores as
well: N_eff = (Σs)² / Σs² (arXiv 2509.25606), counts and ties are as exact, on every device.

Shapes in names: R rows and C columns of a matrix.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from emp_kernels.counting import exact_count
from emp_kernels.dispatch import count_rows, select_rows
from emp_kernels.errors import NonFiniteRowError
from emp_kernels.histogram import BlockHistogram, MagnitudeHistogram, count_low_parts
from emp_kernels.numbers import F32, NumberFormat
from emp_kernels.rows import Bytes, Patterns, PerRow, Threshold

from emp_llm.errors import CheckpointError
from emp_llm.options import Granularity, PruneOptions
from emp_llm.report.tensor_statistics import Group
from emp_llm.selection.group_search import GroupSearch

__all__ = ["MatrixMask", "Scores", "check_scores", "count_magnitudes", "mask_by_scores"]

Scores = npt.NDArray[np.float32]
Counts = npt.NDArray[np.int64]

_COUNTED_AT_A_TIME = 1 << 24
"""Weights: of as many, sums of squared low parts fit 64 bits."""


@dataclass(frozen=True)
class MatrixMask:
    """Which weights of one matrix stay.

    Attributes:
        mask: uint8 [R, ⌈C/8⌉], as `emp_kernels.rows.Given` takes it.
        stats: float64 [R, 3], Σs, Σs² and Σ_kept s of the scores.
        kept: int64 [R], how many weights of each row stay.
        group: The matrix as a group of scores, with granularity `layer`; None with `row`.
    """

    mask: Bytes
    stats: npt.NDArray[np.float64]
    kept: Counts
    group: Group | None


def check_scores(name: str, scores: Scores, criterion: str, *, first_row: int = 0) -> None:
    """Refuse scores that the rule cannot rank.

    Args:
        name: The tensor, for errors.
        scores: float32 [R, C].
        criterion: Name of the criterion that gave them, for errors.
        first_row: Number of the first row among all rows of the tensor.

    Raises:
        CheckpointError: If one is negative, NaN or infinite.
    """
    bad = ~(np.isfinite(scores) & (scores >= 0))
    if not bad.any():
        return
    row, column = np.argwhere(bad)[0].tolist()
    raise CheckpointError(
        f"{name!r} row {first_row + row} column {column}: its score by the criterion "
        f"{criterion!r} is {scores[row, column]:g}, but scores must be finite and not negative: "
        "choose another criterion or calibration text, or leave the tensor out with --ignore"
    )


def mask_by_scores(
    name: str,
    scores: Scores,
    weights: Patterns,
    number_format: NumberFormat,
    options: PruneOptions,
    *,
    first_row: int = 0,
    kept: Counts | None = None,
) -> MatrixMask:
    """Mask one matrix by its scores, with granularity `row` or `layer`.

    Args:
        name: The tensor, for errors.
        scores: float32 [R, C].
        weights: uint16 or uint32 [R, C], bit patterns in the checkpoint's format; their magnitudes
            decide how many stay with ``count_by="magnitude"``, and are ignored otherwise.
        number_format: The checkpoint's format.
        options: The rule.
        first_row: Number of the matrix's first row among all rows of the tensor.
        kept: int64 [R] or, with granularity `layer`, [1]: how many weights of each group stay,
            whatever β is; None for the rule's own.

    Raises:
        CheckpointError: If a score is negative, NaN or infinite, or a weight that is counted is
            NaN or infinite.
    """
    check_scores(name, scores, options.criterion, first_row=first_row)
    bits = np.ascontiguousarray(scores).view(np.uint32)
    if kept is None and options.count_by == "magnitude":
        try:
            kept = count_magnitudes(weights, number_format, options.granularity, [options.beta])[0]
        except NonFiniteRowError as error:
            raise CheckpointError(
                f"{name!r} row {first_row + error.row} holds NaN or infinity, which have no "
                "magnitude: repair the checkpoint or leave the tensor out with --ignore"
            ) from error
    if options.granularity == "row":
        return _selected(bits, PerRow(options.beta), kept, None)
    number = None if kept is None else int(kept[0])
    search = GroupSearch(_histogram(bits, F32), options.beta, number)
    if not search.is_concluded:
        search.add(count_low_parts(bits, search.bin))
        search.conclude()
    key, ties, _ = search.threshold
    return _selected(bits, Threshold(key, ties), None, search.group)


def count_magnitudes(
    weights: Patterns,
    number_format: NumberFormat,
    granularity: Granularity,
    betas: Sequence[float],
) -> Counts:
    """How many weights of each group of one matrix stay by the effective number of magnitudes.

    Args:
        weights: uint16 or uint32 [R, C], bit patterns.
        number_format: Their format.
        granularity: `row` or `layer`.
        betas: B values of β.

    Returns:
        int64 [B, R], or [B, 1] with granularity `layer`.

    Raises:
        NonFiniteRowError: If a row holds NaN or infinity.
    """
    if granularity == "row":
        weights = np.ascontiguousarray(weights)
        return count_rows(weights, number_format, betas).kept.T
    histogram = _histogram(weights, number_format)
    sums = histogram.sums()
    return np.array([[exact_count(*sums, histogram.size, beta)] for beta in betas], np.int64)


def _selected(
    bits: Patterns,
    rule: PerRow | Threshold,
    counts: Counts | None,
    group: Group | None,
) -> MatrixMask:
    selected = select_rows(bits, rule, kept=counts)
    return MatrixMask(selected.mask, selected.stats, selected.table[:, 0].copy(), group)


def _histogram(bits: Patterns, number_format: NumberFormat) -> MagnitudeHistogram:
    histogram = MagnitudeHistogram()
    step = max(1, _COUNTED_AT_A_TIME // bits.shape[1])
    for start in range(0, len(bits), step):
        try:
            block = BlockHistogram(np.ascontiguousarray(bits[start : start + step]), number_format)
        except NonFiniteRowError as error:
            raise NonFiniteRowError(start + error.row) from error
        histogram.add(block)
    return histogram
