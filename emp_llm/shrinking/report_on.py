"""The report of a checkpoint that was shrunken."""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from emp_llm._version import __version__
from emp_llm.checkpoint.shard import Shard
from emp_llm.errors import CheckpointError, FormatError
from emp_llm.options import NO_TARGETS
from emp_llm.output.carried_files import count_files
from emp_llm.report.fields import TensorFields
from emp_llm.report.file import read_report
from emp_llm.report.folder_files import not_described
from emp_llm.report.report import Outcome
from emp_llm.report.shrink_report import (
    HolderFields,
    ShrinkReport,
    ShrinkTotals,
    ShrunkenTensor,
    StructureFields,
    as_other_tensor,
    config_change,
    read_shrink_report,
)
from emp_llm.report.source_fields import SourceFields
from emp_llm.report.tensor_statistics import digits, ratio
from emp_llm.rule_fields import RuleFields
from emp_llm.shrink_options import ShrinkOptions
from emp_llm.shrinking.choice import Choice, Structures, effective
from emp_llm.shrinking.cuts import Cut
from emp_llm.shrinking.plan import Shrinkage

__all__ = [
    "config_changes",
    "report_on",
    "source_rule",
    "structure_fields",
    "total_sizes",
    "written_fields",
]


def report_on(
    shrinkage: Shrinkage,
    options: ShrinkOptions,
    outcomes: Mapping[str, Outcome],
    origin: SourceFields,
    repaired: Collection[str] = (),
) -> ShrinkReport:
    """The report, but for the files beside it.

    Args:
        shrinkage: What was written.
        options: What was asked for.
        outcomes: What became of each tensor, by its new name.
        origin: Name and revision of the source.
        repaired: New names of the tensors that have other weights than the source's.
    """
    plan = shrinkage.plan
    tensors = {cut.name: _tensor(cut, outcomes[cut.name], repaired) for cut in shrinkage.all_cuts}
    report: ShrinkReport = {
        "emp_llm_version": __version__,
        "source": origin,
        "options": options.words(),
        "structures": {
            kind: structure_fields(plan.structures[kind], choice)
            for kind, choice in shrinkage.choices.items()
        },
        "config": config_changes(shrinkage),
        "totals": total_sizes(shrinkage),
        "tensors": dict(sorted(tensors.items())),
        "left_out": sorted(plan.found.outside),
        "carried": count_files(plan.checkpoint),
        "left_behind": list(plan.checkpoint.beside.left_behind),
        "files": {},
    }
    if (rule := source_rule(plan.checkpoint.folder)) is not None:
        report["source_rule"] = rule
    return report


def structure_fields(structures: Structures, choice: Choice) -> StructureFields:
    """What a report says of the structures of one kind."""
    fields: StructureFields = {
        "field": structures.field,
        "number": structures.number,
        "kept": choice.number,
        "score": choice.score,
        "holders": {holder: _holder(choice, holder) for holder in structures.holders},
    }
    if choice.tried:
        fields["tried"] = list(choice.tried)
    return fields


def _holder(choice: Choice, holder: str) -> HolderFields:
    fields: HolderFields = {"kept": list(choice.kept[holder])}
    if scores := choice.scores.get(holder):
        fields["scores"] = [digits(score) for score in scores]
        if min(scores) >= 0:  # as scores are that N_eff is defined for
            fields["n_eff"] = digits(effective(scores))
    return fields


def _tensor(cut: Cut, outcome: Outcome, repaired: Collection[str]) -> ShrunkenTensor:
    entry = cut.new_entry
    fields: ShrunkenTensor = {
        "source": cut.entry.name,
        "dtype": entry.dtype,
        "shape": list(entry.shape),
        "bytes": entry.nbytes,
        "hash": outcome.checksum or "",
    }
    if cut.name in repaired:
        fields["repaired"] = True
    return fields


def total_sizes(shrinkage: Shrinkage) -> ShrinkTotals:
    """The sizes of all tensors, before and after."""
    before = [entry for _, entry in shrinkage.plan.checkpoint.tensors.values()]
    after = [cut.new_entry for cut in shrinkage.all_cuts]
    bytes_before, bytes_after = (sum(one.nbytes for one in side) for side in (before, after))
    return {
        "tensors_before": len(before),
        "tensors_after": len(after),
        "weights_before": sum(math.prod(entry.shape) for entry in before),
        "weights_after": sum(math.prod(entry.shape) for entry in after),
        "bytes_before": bytes_before,
        "bytes_after": bytes_after,
        "bytes_ratio": ratio(bytes_after, bytes_before),
    }


def config_changes(shrinkage: Shrinkage) -> dict[str, str]:
    """The fields of config.json that have changed, also in its parts, as "before → after"."""
    return dict(_changes(shrinkage.plan.checkpoint.config, shrinkage.config))


def _changes(
    before: Mapping[str, Any], after: Mapping[str, Any], path: str = ""
) -> Iterator[tuple[str, str]]:
    for key, value in after.items():
        was = before.get(key)
        if isinstance(value, dict) and isinstance(was, dict):
            yield from _changes(was, value, f"{path}{key}.")
        elif json.dumps(value) != json.dumps(was) or key not in before:
            yield f"{path}{key}", config_change(was, value)


def source_rule(folder: Path) -> RuleFields | None:
    """The rule that a source was pruned by before, by its reports; None if they tell of none.

    Reports that cannot be read, or that are of weights which others were saved over, tell nothing.
    """
    with suppress(CheckpointError, FormatError):
        pruned = read_report(folder)
        if pruned is not None and not_described(folder, pruned) is not None:
            return None
        if pruned is not None and pruned["rule"]["targets"] != NO_TARGETS:
            return pruned["rule"]
        shrunken = read_shrink_report(folder)
        return None if shrunken is None else shrunken.get("source_rule")
    return None


def written_fields(
    shrinkage: Shrinkage, shard: Shard, outcomes: Mapping[str, Outcome]
) -> dict[str, TensorFields] | None:
    """What a report says of the tensors of a file; None if the outcomes are not theirs."""
    cuts = shrinkage.cuts[shard.name]
    if outcomes.keys() != {cut.name for cut in cuts}:
        return None
    return {cut.name: as_other_tensor(_tensor(cut, outcomes[cut.name], ())) for cut in cuts}
