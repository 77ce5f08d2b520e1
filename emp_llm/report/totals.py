"""Sums over the tensors of a report: the one place that adds up."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from emp_llm.errors import FormatError
from emp_llm.report.file_names import REPORT_NAME
from emp_llm.report.tensor_statistics import HISTOGRAM_BINS, TensorStatistics, digits, ratio

__all__ = ["cells", "check_totals", "compare_totals", "count_totals", "kinds", "mass_totals"]


_BLOCK = re.compile(r"(.*)\.(\d+)")
"""The prefix of a block: the list it lies in, and its number there."""


def count_totals(
    tensors: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sums of a report that follow from what it says of each tensor.

    Args:
        tensors: The report's part on tensors.

    Returns:
        Sums over those that were pruned, and over all.
    """
    return (
        _sums([fields for fields in tensors.values() if fields["pruned"]]),
        _sums(list(tensors.values())),
    )


def _sums(tensors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
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


def mass_totals(tensors: Sequence[TensorStatistics]) -> dict[str, Any]:
    """Totals that the rounded figures of the tensors would not give exactly.

    Args:
        tensors: Figures of those that were pruned, in the order of their names.
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


def kinds(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Totals of a report's pruned tensors by kind of layer, in the order of their names."""
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for fields in _pruned(report):
        grouped.setdefault(fields["kind"], []).append(fields)
    return {kind: _group_totals(tensors) for kind, tensors in sorted(grouped.items())}


def cells(report: Mapping[str, Any]) -> dict[tuple[str | None, str], dict[str, Any]]:
    """Totals of a report's pruned tensors by block and kind of layer.

    Returns:
        By (block, kind), the blocks in the order of the model.
    """
    grouped: dict[tuple[str | None, str], list[Mapping[str, Any]]] = {}
    for fields in _pruned(report):
        grouped.setdefault((fields["block"], fields["kind"]), []).append(fields)
    order = sorted(grouped, key=lambda cell: (_block_order(cell[0]), cell[1]))
    return {cell: _group_totals(grouped[cell]) for cell in order}


def _block_order(block: str | None) -> tuple[bool, str, int]:
    """Blocks of one list in the order of their numbers, what lies outside blocks last."""
    match = _BLOCK.fullmatch(block or "")
    stem, number = (match[1], int(match[2])) if match else (block or "", -1)
    return block is None, stem, number


def _pruned(report: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    return (fields for fields in report["tensors"].values() if fields["pruned"])


def _group_totals(tensors: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Totals of some of a report's pruned tensors, worked out from what it says of each."""
    sums = _sums(tensors)
    mass = sum(fields["mass"] for fields in tensors)
    fractions = sum(fields["n_eff_fraction_mean"] * fields["weights"] for fields in tensors)
    bounds = [fields["retained_mass_bound"] for fields in tensors]
    histogram = [0] * HISTOGRAM_BINS
    for fields in tensors:
        counts = fields["n_eff_fraction_histogram"]
        for i, count in enumerate(counts, fields["n_eff_fraction_histogram_start"]):
            histogram[i] += count

    def retained(shares: Sequence[float]) -> float:
        kept = sum(share * fields["mass"] for share, fields in zip(shares, tensors, strict=True))
        return ratio(kept, mass, empty=1.0)

    return sums | {
        "rows": sum(fields["rows"] for fields in tensors),
        "n_eff_fraction_min": min(fields["n_eff_fraction_min"] for fields in tensors),
        "n_eff_fraction_mean": ratio(fractions, sums["weights"]),
        "n_eff_fraction_max": max(fields["n_eff_fraction_max"] for fields in tensors),
        "n_eff_fraction_histogram": histogram,
        "retained_mass": retained([fields["retained_mass"] for fields in tensors]),
        "retained_mass_bound": None if None in bounds else retained(bounds),
    }


def check_totals(report: Mapping[str, Any]) -> None:
    """See that a report's totals are what its tensors add up to.

    Raises:
        FormatError: If one is not.
    """
    for part, counted in zip(("targets", "model"), count_totals(report["tensors"]), strict=True):
        compare_totals(report, part, counted)


def compare_totals(report: Mapping[str, Any], part: str, counted: Mapping[str, Any]) -> None:
    """Compare totals with those of a part (``targets`` or ``model``) of a report.

    Raises:
        FormatError: If one is another number there.
    """
    told = report["totals"][part]
    for name, value in counted.items():
        if told.get(name) != value:
            raise FormatError(
                f"{REPORT_NAME}: {name} of {part} is {told.get(name)}, its tensors add up to "
                f"{value}: the report is not as it was written"
            )
