"""Sums over the tensors of a report, all computed here.

What a report holds is summed from what it says of each tensor, so that it can be checked again.
Only masses and means come from the statistics behind it, since six digits would not add up exactly.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
import numpy.typing as npt

from emp_llm.errors import FormatError
from emp_llm.report.fields import (
    HISTOGRAM_BINS,
    CurveTotals,
    FileTotals,
    GroupTotals,
    MassTotals,
    PrunedTensor,
    Report,
    ReportTotals,
    Sums,
    TensorFields,
)
from emp_llm.report.file_names import REPORT_NAME
from emp_llm.report.tensor_statistics import TensorStatistics, digits, ratio

__all__ = [
    "LeftAlone",
    "TargetCurve",
    "cells",
    "check_totals",
    "compare_totals",
    "count_totals",
    "curve_totals",
    "file_totals",
    "kinds",
    "left_alone",
    "mass_totals",
    "pruned_tensors",
    "rest_totals",
    "sparsity_of",
]


_BLOCK = re.compile(r"(.*)\.(\d+)")
"""The prefix of a decoder block: the list it lies in, and its number there."""


def count_totals(tensors: Mapping[str, TensorFields]) -> tuple[Sums, Sums]:
    """The sums of a report that follow from what it says of each tensor.

    Args:
        tensors: The report's part on tensors.

    Returns:
        Sums over those that were pruned, and over all.
    """
    everything = list(tensors.values())
    return _sums([fields for fields in everything if fields["pruned"]]), _sums(everything)


def rest_totals(report: Report) -> Sums:
    """The sums over the tensors of a report that were not pruned."""
    return _sums([fields for fields in report["tensors"].values() if not fields["pruned"]])


def _sums(tensors: Sequence[TensorFields]) -> Sums:
    weights, kept, before, after = (
        sum(fields[name] for fields in tensors)
        for name in ("weights", "kept", "bytes_before", "bytes_after")
    )
    return {
        "tensors": len(tensors),
        "weights": weights,
        "kept": kept,
        "sparsity": ratio(weights - kept, weights),
        "bytes_before": before,
        "bytes_after": after,
        "bytes_ratio": ratio(after, before),
    }


def mass_totals(tensors: Sequence[TensorStatistics]) -> MassTotals:
    """Totals that the rounded statistics of the tensors would not give exactly.

    Args:
        tensors: Statistics of those that were pruned, in the order of their names.
    """
    weights = sum(tensor.weights for tensor in tensors)
    mass = sum(tensor.mass for tensor in tensors)
    fractions = sum(tensor.fraction_mean * tensor.weights for tensor in tensors)
    bounds = [tensor.bound_mass for tensor in tensors if tensor.bound_mass is not None]
    bound = ratio(sum(bounds), mass, empty=1.0) if len(bounds) == len(tensors) else None
    return {
        "n_eff_fraction_min": digits(min((t.fraction_min for t in tensors), default=0.0)),
        "n_eff_fraction_mean": ratio(fractions, weights),
        "n_eff_fraction_max": digits(max((t.fraction_max for t in tensors), default=0.0)),
        "retained_mass": ratio(sum(tensor.kept_mass for tensor in tensors), mass, empty=1.0),
        "retained_mass_bound": bound,
    }


def pruned_tensors(report: Report) -> dict[str, PrunedTensor]:
    """A report's pruned tensors by their names."""
    return {name: fields for name, fields in report["tensors"].items() if fields["pruned"]}


def kinds(report: Report) -> dict[str, GroupTotals]:
    """Totals of a report's pruned tensors by kind of layer, in the order of their names."""
    grouped: dict[str, list[PrunedTensor]] = {}
    for fields in pruned_tensors(report).values():
        grouped.setdefault(fields["kind"], []).append(fields)
    return {kind: _group_totals(tensors) for kind, tensors in sorted(grouped.items())}


def cells(report: Report) -> dict[tuple[str | None, str], GroupTotals]:
    """Totals of a report's pruned tensors by decoder block and kind of layer.

    Returns:
        By (block, kind), the blocks in the order of the model.
    """
    grouped: dict[tuple[str | None, str], list[PrunedTensor]] = {}
    for fields in pruned_tensors(report).values():
        grouped.setdefault((fields["block"], fields["kind"]), []).append(fields)
    order = sorted(grouped, key=lambda cell: (_block_order(cell[0]), cell[1]))
    return {cell: _group_totals(grouped[cell]) for cell in order}


def _block_order(block: str | None) -> tuple[bool, str, int]:
    """Blocks of one list in the order of their numbers, what lies outside blocks last."""
    match = _BLOCK.fullmatch(block or "")
    stem, number = (match[1], int(match[2])) if match else (block or "", -1)
    return block is None, stem, number


def _group_totals(tensors: Sequence[PrunedTensor]) -> GroupTotals:
    """Totals of some of a report's pruned tensors, worked out from what it says of each."""
    sums = _sums(tensors)
    mass = sum(fields["mass"] for fields in tensors)
    fractions = sum(fields["n_eff_fraction_mean"] * fields["weights"] for fields in tensors)
    bounds = [b for b in (fields["retained_mass_bound"] for fields in tensors) if b is not None]

    def retained(shares: Sequence[float]) -> float:
        kept = sum(share * fields["mass"] for share, fields in zip(shares, tensors, strict=True))
        return ratio(kept, mass, empty=1.0)

    return {
        **sums,
        "rows": sum(fields["rows"] for fields in tensors),
        "n_eff_fraction_min": min(fields["n_eff_fraction_min"] for fields in tensors),
        "n_eff_fraction_mean": ratio(fractions, sums["weights"]),
        "n_eff_fraction_max": max(fields["n_eff_fraction_max"] for fields in tensors),
        "n_eff_fraction_histogram": _histogram(tensors),
        "retained_mass": retained([fields["retained_mass"] for fields in tensors]),
        "retained_mass_bound": retained(bounds) if len(bounds) == len(tensors) else None,
    }


def _histogram(tensors: Iterable[PrunedTensor]) -> list[int]:
    """Groups of all tensors in all bins; tensors leave out the empty ones at their ends."""
    histogram = [0] * HISTOGRAM_BINS
    for fields in tensors:
        counts = fields["n_eff_fraction_histogram"]
        for i, count in enumerate(counts, fields["n_eff_fraction_histogram_start"]):
            histogram[i] += count
    return histogram


def sparsity_of(parts: Iterable[Sums]) -> float | None:
    """The sparsity of several groups together, not rounded; None where they have no weights."""
    parts = list(parts)
    weights, kept = (sum(part[name] for part in parts) for name in ("weights", "kept"))
    return (weights - kept) / weights if weights else None


class LeftAlone(TypedDict):
    """Tensors that were not pruned for one reason.

    Attributes:
        names: Their names, in the report's order.
        bytes: Bytes of their data in the source.
        bytes_after: Bytes of their data in the result.
    """

    names: list[str]
    bytes: int
    bytes_after: int


def left_alone(report: Report) -> dict[str, LeftAlone]:
    """A report's other tensors by the reason that they were not pruned, most bytes first."""
    reasons: dict[str, LeftAlone] = {}
    for name, fields in report["tensors"].items():
        if not fields["pruned"]:
            part = reasons.setdefault(fields["reason"], {"names": [], "bytes": 0, "bytes_after": 0})
            part["names"].append(name)
            part["bytes"] += fields["bytes_before"]
            part["bytes_after"] += fields["bytes_after"]
    return dict(sorted(reasons.items(), key=lambda item: (-item[1]["bytes"], item[0])))


@dataclass(frozen=True)
class TargetCurve:
    """One target at P values of β.

    Attributes:
        statistics: The target at the β that was asked for.
        kept: int64 [P], weights that stay.
        kept_mass: float64 [P], Σ|w| of them.
        nbytes: int64 [P], bytes of the packed tensor.
    """

    statistics: TensorStatistics
    kept: npt.NDArray[np.int64]
    kept_mass: npt.NDArray[np.float64]
    nbytes: npt.NDArray[np.int64]


def curve_totals(targets: Sequence[TargetCurve]) -> CurveTotals:
    """Totals of some targets at each β of a curve."""
    weights = sum(target.statistics.weights for target in targets)
    mass = sum(target.statistics.mass for target in targets)
    kept = [sum(counts) for counts in zip(*(t.kept.tolist() for t in targets), strict=True)]
    masses = [sum(parts) for parts in zip(*(t.kept_mass.tolist() for t in targets), strict=True)]
    nbytes = [sum(sizes) for sizes in zip(*(t.nbytes.tolist() for t in targets), strict=True)]
    return {
        "kept": kept,
        "bytes": nbytes,
        "sparsity": [ratio(weights - count, weights) for count in kept],
        "retained_mass": [ratio(part, mass, empty=1.0) for part in masses],
    }


def file_totals(before: Iterable[int], after: Iterable[int], dense: Iterable[int]) -> FileTotals:
    """Totals of files of weights, whose bytes these are: in the source, packed, and dense."""
    return {"bytes_before": sum(before), "bytes_after": sum(after), "bytes_dense": sum(dense)}


def check_totals(report: Report) -> None:
    """Check that a report's totals are what its tensors add up to.

    Raises:
        FormatError: If one is not.
    """
    targets, model = count_totals(report["tensors"])
    compare_totals(report["totals"], "targets", targets)
    compare_totals(report["totals"], "model", model)


def compare_totals(
    totals: ReportTotals, part: Literal["targets", "model"], counted: Sums | MassTotals
) -> None:
    """Compare totals with those of a part of a report.

    Raises:
        FormatError: If one is another number there.
    """
    stated = totals[part]
    for name, value in counted.items():
        if stated.get(name) != value:
            raise FormatError(
                f"{REPORT_NAME}: {name} of {part} is {stated.get(name)}, its tensors add up to "
                f"{value}: the report is not as it was written"
            )
