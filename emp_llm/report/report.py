"""The report of a pruning: what was done to every tensor, and what it came to.

Nothing in it depends on when, where or on how many threads it was made: the same source and
options give the same bytes.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from emp_llm._version import __version__
from emp_llm.checkpoint.header import TensorEntry
from emp_llm.errors import FormatError
from emp_llm.options import PruneOptions
from emp_llm.report.tensor_statistics import TensorStatistics
from emp_llm.report.totals import count_totals, mass_totals
from emp_llm.rule_fields import _calibration_fields, rule_fields
from emp_llm.structure.targets import TargetDecision
from emp_llm.tensors.packed_config import FORMAT_VERSION

__all__ = ["Calibrated", "Outcome", "TensorReport", "build_report", "dense_report"]


@dataclass(frozen=True)
class Outcome:
    """What became of one tensor.

    Attributes:
        figures: What pruning did to it; None if it was not pruned.
        checksum: Of its bytes in the result, with the name of the algorithm; None if nothing was
            written. A transposed dense tensor's is taken over its rows in order.
    """

    figures: TensorStatistics | None = None
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


@dataclass(frozen=True, kw_only=True)
class TensorReport:
    """What was done to one tensor.

    Attributes:
        entry: Its place in the source.
        decision: Whether it was pruned, and why.
        outcome: What became of it.
    """

    entry: TensorEntry
    decision: TargetDecision
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


def _search_data(options: PruneOptions) -> dict[str, Any] | None:
    """What β was searched on, if it was."""
    if options.calibration is None or options.max_loss_increase is None:
        return None
    return _calibration_fields(options.calibration)


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
