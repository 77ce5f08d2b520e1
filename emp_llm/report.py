"""The report of a pruning: what was done to every tensor, and what it came to.

Nothing in it depends on when, where or on how many threads it was made: the same source and
options give the same bytes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from emp_llm import __version__
from emp_llm.options import PruneOptions
from emp_llm.packed import FORMAT_VERSION
from emp_llm.safetensors_header import ITEM_BITS, TensorEntry
from emp_llm.tally import TensorFigures, ratio
from emp_llm.targets import Decision

__all__ = ["TensorReport", "build_report", "dense_report", "kinds", "rule_fields"]


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """What was done to one tensor.

    Attributes:
        entry: Its place in the source.
        decision: Whether it was pruned, and why.
        figures: What that did to it; None if it was not pruned.
        checksum: Of its bytes in the result, with the name of the algorithm; None if nothing was
            written. A transposed dense tensor's is taken over its rows in order.
    """

    entry: TensorEntry
    decision: Decision
    figures: TensorFigures | None
    checksum: str | None

    @property
    def weights(self) -> int:
        """Items of the tensor."""
        return self.entry.nbytes * 8 // ITEM_BITS[self.entry.dtype]

    @property
    def bytes_after(self) -> int:
        """Bytes of its data in the result."""
        return self.figures.bytes_after if self.figures else self.entry.nbytes

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        fields: dict[str, Any] = {
            "pruned": self.decision.prune,
            "reason": self.decision.reason,
            "kind": self.decision.kind,
            "block": self.decision.block,
            "dtype": self.entry.dtype,
        }
        if self.figures:
            fields |= {"transposed": self.decision.transposed} | self.figures.to_dict()
        else:
            size = self.entry.nbytes
            fields |= {"shape": list(self.entry.shape), "bytes_before": size, "bytes_after": size}
        return fields | ({"hash": self.checksum} if self.checksum else {})


def rule_fields(options: PruneOptions) -> dict[str, Any]:
    """The options that decide which weights stay, by the names that configs and reports use."""
    return {
        "beta": options.beta,
        "granularity": options.granularity,
        "criterion": "magnitude",
        "targets": options.targets,
        "ignore": list(options.ignore),
    }


def build_report(
    tensors: Iterable[TensorReport], options: PruneOptions, source: Mapping[str, Any]
) -> dict[str, Any]:
    """The whole report, as `emp_report.json` holds it.

    Args:
        tensors: Every tensor of the checkpoint.
        options: What was asked for.
        source: Name and revision of the model that was pruned.
    """
    ordered = sorted(tensors, key=lambda tensor: tensor.entry.name)
    pruned = [tensor.figures for tensor in ordered if tensor.figures]
    totals = {"targets": _totals(pruned), "model": _model_totals(ordered, pruned)}
    return {
        "emp_llm_version": __version__,
        "format": options.output_format,
        "format_version": FORMAT_VERSION,
        "source": dict(source),
        "rule": rule_fields(options),
        "totals": totals,
        "tensors": {tensor.entry.name: tensor.to_dict() for tensor in ordered},
    }


def dense_report(report: Mapping[str, Any], hashes: Mapping[str, str]) -> dict[str, Any]:
    """The report of a packed folder as that of the same weights in a dense one.

    Args:
        report: The packed folder's.
        hashes: Checksum of each tensor in the dense folder.
    """

    def dense(fields: Mapping[str, Any]) -> dict[str, Any]:
        return {**fields, "bytes_after": fields["bytes_before"], "bytes_ratio": 1.0}

    tensors = {
        name: {**fields, "bytes_after": fields["bytes_before"], "hash": hashes[name]}
        for name, fields in report["tensors"].items()
    }
    totals = {part: dense(fields) for part, fields in report["totals"].items()}
    return {**report, "format": "dense", "totals": totals, "tensors": tensors}


def _totals(figures: Iterable[TensorFigures]) -> dict[str, Any]:
    """Sums over pruned tensors."""
    tensors = list(figures)
    weights = sum(tensor.weights for tensor in tensors)
    kept = sum(tensor.kept for tensor in tensors)
    mass = sum(tensor.mass for tensor in tensors)
    bounds = [tensor.bound_mass for tensor in tensors]
    before = sum(tensor.bytes_before for tensor in tensors)
    after = sum(tensor.bytes_after for tensor in tensors)
    fractions = sum(tensor.fraction_mean * tensor.weights for tensor in tensors)
    return {
        "tensors": len(tensors),
        "weights": weights,
        "kept": kept,
        "sparsity": ratio(weights - kept, weights),
        "n_eff_fraction_mean": ratio(fractions, weights),
        "retained_mass": ratio(sum(tensor.kept_mass for tensor in tensors), mass, empty=1.0),
        "retained_mass_bound": (
            None
            if any(bound is None for bound in bounds)
            else ratio(sum(bound for bound in bounds if bound is not None), mass, empty=1.0)
        ),
        "bytes_before": before,
        "bytes_after": after,
        "bytes_ratio": ratio(after, before),
    }


def _model_totals(tensors: list[TensorReport], pruned: list[TensorFigures]) -> dict[str, Any]:
    weights = sum(tensor.weights for tensor in tensors)
    removed = sum(figures.weights - figures.kept for figures in pruned)
    before = sum(tensor.entry.nbytes for tensor in tensors)
    after = sum(tensor.bytes_after for tensor in tensors)
    return {
        "tensors": len(tensors),
        "weights": weights,
        "kept": weights - removed,
        "sparsity": ratio(removed, weights),
        "bytes_before": before,
        "bytes_after": after,
        "bytes_ratio": ratio(after, before),
    }


def kinds(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Totals of a report's pruned tensors by kind of layer, in the order of their names.

    The retained mass of a kind is the mean of its tensors', weighted by their size.
    """
    grouped: dict[str, list[dict[str, Any]]] = {}
    for fields in report["tensors"].values():
        if fields["pruned"]:
            grouped.setdefault(fields["kind"], []).append(fields)
    return {kind: _kind_totals(tensors) for kind, tensors in sorted(grouped.items())}


def _kind_totals(tensors: list[dict[str, Any]]) -> dict[str, Any]:
    weights = sum(fields["weights"] for fields in tensors)
    kept = sum(fields["kept"] for fields in tensors)
    before = sum(fields["bytes_before"] for fields in tensors)
    after = sum(fields["bytes_after"] for fields in tensors)

    def mean(field: str) -> float:
        return ratio(sum(fields[field] * fields["weights"] for fields in tensors), weights)

    return {
        "tensors": len(tensors),
        "weights": weights,
        "n_eff_fraction_mean": mean("n_eff_fraction_mean"),
        "sparsity": ratio(weights - kept, weights),
        "retained_mass": mean("retained_mass"),
        "bytes_before": before,
        "bytes_after": after,
        "bytes_ratio": ratio(after, before),
    }
