"""The report of a pruning: what was done to every tensor, and what it came to.

Nothing in it depends on when, where or on how many threads it was made: the same source and
options give the same bytes.
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from emp_llm import __version__
from emp_llm.calibration.decisions import DecisionStore
from emp_llm.calibration.options import CalibrationOptions, needs_decisions
from emp_llm.errors import FormatError
from emp_llm.options import PruneOptions
from emp_llm.packed import FORMAT_VERSION
from emp_llm.sources.safetensors_header import TensorEntry
from emp_llm.tally import HISTOGRAM_BINS, TensorFigures, digits, ratio
from emp_llm.targets import Decision

__all__ = [
    "Calibrated",
    "Outcome",
    "TensorReport",
    "build_report",
    "cells",
    "count_totals",
    "dense_report",
    "kinds",
    "mass_totals",
    "rule_fields",
    "told_rule",
]

_BLOCK = re.compile(r"(.*)\.(\d+)")
"""The prefix of a block: the list it lies in, and its number there."""


@dataclass(frozen=True)
class Outcome:
    """What became of one tensor.

    Attributes:
        figures: What pruning did to it; None if it was not pruned.
        checksum: Of its bytes in the result, with the name of the algorithm; None if nothing was
            written. A transposed dense tensor's is taken over its rows in order.
    """

    figures: TensorFigures | None = None
    checksum: str | None = None


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What there is to be told of a run whose masks or weights come from data.

    Attributes:
        data: What was found out of the data beyond what was asked for, such as their ``hash``.
        notes: Other facts, by the names that the report uses.
        repaired: Tensors that have new weights, targets and biases.
    """

    data: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    repaired: Collection[str] = ()

    @classmethod
    def of(cls, store: DecisionStore) -> "Calibrated":
        """What decisions tell."""
        notes = {name: v for name, v in store.notes.items() if name not in ("beta", "search")}
        repaired = {name for name in store.names if store.is_repaired(name)}
        return cls(
            data=notes.pop("calibration", {}),
            notes=notes,
            repaired=repaired.union(store.replaced_names),
        )


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """What was done to one tensor.

    Attributes:
        entry: Its place in the source.
        decision: Whether it was pruned, and why.
        outcome: What became of it.
    """

    entry: TensorEntry
    decision: Decision
    outcome: Outcome

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        fields: dict[str, Any] = {
            "pruned": self.decision.prune,
            "reason": self.decision.reason,
            "kind": self.decision.kind,
            "block": self.decision.block,
            "dtype": self.entry.dtype,
        }
        if self.outcome.figures:
            fields |= {"transposed": self.decision.transposed} | self.outcome.figures.to_dict()
        else:
            weights, nbytes = math.prod(self.entry.shape), self.entry.nbytes
            fields |= {"shape": list(self.entry.shape), "weights": weights, "kept": weights}
            fields |= {"bytes_before": nbytes, "bytes_after": nbytes}
        checksum = self.outcome.checksum
        return fields | ({"hash": checksum} if checksum else {})


def rule_fields(options: PruneOptions, data: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The options that decide which weights stay, by the names that configs and reports use.

    What is asked of scores from data is there only where it is not the default.

    Args:
        options: The options.
        data: What a calibration found out of its data, beyond what was asked for.
    """
    fields: dict[str, Any] = {
        "beta": options.beta,
        "granularity": options.granularity,
        "criterion": options.criterion,
        "targets": options.targets,
        "ignore": list(options.ignore),
    }
    if options.criterion != "magnitude" and options.count_by != "criterion":
        fields["count_by"] = options.count_by
    if options.repair != "none":
        fields["repair"] = options.repair
    calibration = options.calibration
    if calibration is not None and needs_decisions(options):
        fields["calibration"] = _calibration_fields(calibration) | dict(data or {})
    return fields


def _search_data(options: PruneOptions) -> dict[str, Any] | None:
    """What β was searched on, if it was."""
    if options.calibration is None or options.max_loss_increase is None:
        return None
    return _calibration_fields(options.calibration)


def _calibration_fields(calibration: CalibrationOptions) -> dict[str, Any]:
    """What was asked of a calibration; of a file no more than its name, to give nothing away."""
    text = calibration.text
    if text is None:  # it was the seed only that was needed
        return {"seed": calibration.seed}
    return {
        "text": Path(text).name if Path(text).is_file() else text,
        "samples": calibration.samples,
        "length": calibration.length,
        "seed": calibration.seed,
        "sequential": calibration.sequential,
    }


def told_rule(told: Mapping[str, Any]) -> dict[str, Any]:
    """What a report's rule, or a config, tells by the names of `rule_fields`."""
    optional = ("count_by", "repair", "calibration")
    return {name: told.get(name) for name in rule_fields(PruneOptions())} | {
        name: told[name] for name in optional if name in told
    }


def build_report(
    tensors: Iterable[TensorReport],
    options: PruneOptions,
    source: Mapping[str, Any],
    calibrated: Calibrated,
) -> dict[str, Any]:
    """The whole report, as `emp_report.json` holds it.

    Args:
        tensors: Every tensor of the checkpoint.
        options: What was asked for.
        source: Name and revision of the model that was pruned.
        calibrated: What there is to be told of scores from data.
    """
    ordered = sorted(tensors, key=lambda tensor: tensor.entry.name)
    fields = {tensor.entry.name: tensor.to_dict() for tensor in ordered}
    for name in calibrated.repaired:
        fields[name]["repaired"] = True
    targets, model = count_totals(fields)
    figures = [tensor.outcome.figures for tensor in ordered]
    targets |= mass_totals([known for known in figures if known])
    sought = {
        "target_sparsity": options.target_sparsity,
        "max_loss_increase": options.max_loss_increase,
        "search_data": _search_data(options),
    }
    return {
        "emp_llm_version": __version__,
        "format": options.output_format,
        "format_version": FORMAT_VERSION,
        "source": dict(source),
        "rule": rule_fields(options, calibrated.data),
        **{name: value for name, value in sought.items() if value is not None},
        **({"calibration": dict(calibrated.notes)} if calibrated.notes else {}),
        "totals": {"targets": targets, "model": model},
        "tensors": fields,
    }


def dense_report(report: Mapping[str, Any], hashes: Mapping[str, str]) -> dict[str, Any]:
    """The report of a packed folder as that of the same weights in a dense one.

    Args:
        report: The packed folder's.
        hashes: Checksum of each tensor in the dense folder.

    Raises:
        FormatError: If the report tells of other tensors.
    """
    others = hashes.keys() ^ report["tensors"].keys()
    if others:
        raise FormatError(
            f"tensor {min(others)!r} is in the report or in the folder, but not in both: the "
            "folder is not as it was written; download or prune it again"
        )
    fields = {
        name: {**tensor, "bytes_after": tensor["bytes_before"], "hash": hashes[name]}
        for name, tensor in report["tensors"].items()
    }
    targets, model = count_totals(fields)
    totals = {"targets": {**report["totals"]["targets"], **targets}, "model": model}
    return {**report, "format": "dense", "totals": totals, "tensors": fields}


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


def mass_totals(tensors: Sequence[TensorFigures]) -> dict[str, Any]:
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
