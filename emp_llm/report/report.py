"""The report of a pruning: what was done to every tensor, and the sums over all of them.

Nothing in it depends on when, where or on how many threads it was made: the same source and
options give the same bytes.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from emp_llm._version import __version__
from emp_llm.checkpoint.header import TensorEntry
from emp_llm.errors import FormatError
from emp_llm.options import PruneOptions, packs_rest
from emp_llm.report.fields import (
    ExtraFields,
    NoteFields,
    OtherTensor,
    PrunedTensor,
    Report,
    ReportTotals,
    TensorFields,
)
from emp_llm.report.file_names import NOT_AS_WRITTEN
from emp_llm.report.source_fields import SourceFields
from emp_llm.report.tensor_statistics import TensorStatistics
from emp_llm.report.totals import count_totals, mass_totals
from emp_llm.rule_fields import SampleFields, data_fields, rule_fields
from emp_llm.structure.targets import TargetDecision
from emp_llm.tensors.packed_config import format_version

__all__ = ["Calibrated", "Outcome", "TensorReport", "build_report", "dense_report"]


@dataclass(frozen=True)
class Outcome:
    """What became of one tensor.

    Attributes:
        statistics: What pruning did to it; None if it was not pruned.
        checksum: Of its bytes in the result, with the name of the algorithm; None if nothing was
            written. A transposed dense tensor's is taken over its rows in order.
        packed_bytes: Bytes of its data in the result if it was packed without being pruned.
    """

    statistics: TensorStatistics | None = None
    checksum: str | None = None
    packed_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """What a report says of a run whose masks or weights come from data.

    Attributes:
        samples: What the samples turned out to be.
        notes: What else the calibration met.
        repaired: Tensors that have new weights, targets and biases.
        betas: The β of each target, where targets have different ones.
    """

    samples: SampleFields = field(default_factory=SampleFields)
    notes: NoteFields = field(default_factory=NoteFields)
    repaired: Collection[str] = ()
    betas: Mapping[str, float] = field(default_factory=dict)


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

    def to_dict(self) -> TensorFields:
        """The fields of the report on it."""
        statistics, checksum = self.outcome.statistics, self.outcome.checksum
        fields = self._other() if statistics is None else self._pruned(statistics)
        if checksum is not None:
            fields["hash"] = checksum
        return fields

    def _pruned(self, statistics: TensorStatistics) -> PrunedTensor:
        return {
            "pruned": True,
            "reason": self.decision.reason,
            "kind": self.decision.kind,
            "block": self.decision.block,
            "dtype": self.entry.dtype,
            "transposed": self.decision.transposed,
            **statistics.to_dict(),
        }

    def _other(self) -> OtherTensor:
        weights, nbytes = math.prod(self.entry.shape), self.entry.nbytes
        packed_bytes = self.outcome.packed_bytes
        return {
            "pruned": False,
            "reason": self.decision.reason,
            "kind": self.decision.kind,
            "block": self.decision.block,
            "dtype": self.entry.dtype,
            "shape": list(self.entry.shape),
            "weights": weights,
            "kept": weights,
            "bytes_before": nbytes,
            "bytes_after": nbytes if packed_bytes is None else packed_bytes,
        }


def build_report(
    tensors: Iterable[TensorReport],
    options: PruneOptions,
    source: SourceFields,
    calibrated: Calibrated,
) -> Report:
    """The whole report, as `emp_report.json` holds it, but for the files beside it.

    Args:
        tensors: Every tensor of the checkpoint.
        options: What was asked for.
        source: Name and revision of the model that was pruned.
        calibrated: What data decided on, and what became of it.
    """
    ordered = sorted(tensors, key=lambda tensor: tensor.entry.name)
    fields = {tensor.entry.name: tensor.to_dict() for tensor in ordered}
    for name in calibrated.repaired:
        fields[name]["repaired"] = True
    for name, beta in calibrated.betas.items():
        tensor = fields[name]
        if tensor["pruned"]:
            tensor["beta"] = beta
    targets, model = count_totals(fields)
    statistics = [t.outcome.statistics for t in ordered if t.outcome.statistics is not None]
    return {
        "emp_llm_version": __version__,
        "format": options.output_format,
        "format_version": format_version(rest_packed=packs_rest(options)),
        "source": source,
        "rule": rule_fields(options, calibrated.samples),
        **_extra_fields(options, calibrated.notes),
        "totals": {"targets": {**targets, **mass_totals(statistics)}, "model": model},
        "tensors": fields,
    }


def _extra_fields(options: PruneOptions, notes: NoteFields) -> ExtraFields:
    fields: ExtraFields = {}
    if options.target_sparsity is not None:
        fields["target_sparsity"] = options.target_sparsity
    if options.max_loss_increase is not None:
        fields["max_loss_increase"] = options.max_loss_increase
        if options.calibration is not None:
            fields["search_data"] = data_fields(options.calibration)
    if notes:
        fields["calibration"] = notes
    return fields


def dense_report(report: Report, hashes: Mapping[str, str]) -> Report:
    """The report of a packed folder as that of the same weights in a dense one.

    Args:
        report: The packed folder's.
        hashes: Checksum of each tensor in the dense folder.

    Raises:
        FormatError: If the report has other tensors than the folder.
    """
    others = hashes.keys() ^ report["tensors"].keys()
    if others:
        raise FormatError(
            f"tensor {min(others)!r} is in the report or in the folder, but not in both: "
            f"{NOT_AS_WRITTEN}"
        )
    fields = {name: _dense(tensor, hashes[name]) for name, tensor in report["tensors"].items()}
    targets, model = count_totals(fields)
    totals: ReportTotals = {
        "targets": {**report["totals"]["targets"], **targets},
        "model": model,
    }
    version = format_version(rest_packed=False)
    return {
        **report,
        "format": "dense",
        "format_version": version,
        "totals": totals,
        "tensors": fields,
    }


def _dense(tensor: TensorFields, checksum: str) -> TensorFields:
    fields = tensor.copy()
    fields["bytes_after"] = tensor["bytes_before"]
    fields["hash"] = checksum
    return fields
