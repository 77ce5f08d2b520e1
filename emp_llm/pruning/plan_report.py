"""Builds the report of a plan that was carried out."""

import os
from collections.abc import Mapping
from pathlib import Path

from emp_llm.checkpoint.shard import Shard
from emp_llm.hub.source import Source
from emp_llm.messages import encodable
from emp_llm.output.carried_files import count_files
from emp_llm.pruning.plan import PruningPlan
from emp_llm.report.fields import Report, TensorFields
from emp_llm.report.report import Calibrated, Outcome, TensorReport, build_report
from emp_llm.report.source_fields import SourceFields

__all__ = ["origin", "report_on", "shard_fields", "tensor_report"]


def origin(model: str | os.PathLike[str], source: Source) -> SourceFields:
    """Name and revision of a model; of a local one the folder's name, not its whole path."""
    name = source.repo_id or Path(model).resolve().name
    return {"model": encodable(name), "revision": source.revision}


def report_on(
    plan: PruningPlan,
    outcomes: Mapping[str, Outcome],
    origin: SourceFields,
    calibrated: Calibrated | None = None,
) -> Report:
    """The report.

    Args:
        plan: The plan, with the β that was used.
        outcomes: What was done to each tensor.
        origin: Name and revision of the model.
        calibrated: What scores from data found; None without any.
    """
    report = build_report(
        (
            tensor_report(plan, name, outcomes.get(name, Outcome()))
            for name in plan.checkpoint.tensors
        ),
        plan.options,
        origin,
        calibrated or Calibrated(),
    )
    if plan.delta is not None:
        report["base"], report["in_base"] = plan.delta.base, plan.delta.in_base
    if plan.missing:
        report["missing"] = list(plan.missing)
    report["carried"] = count_files(plan.checkpoint)
    report["left_behind"] = list(plan.checkpoint.beside.left_behind)
    return report


def tensor_report(plan: PruningPlan, name: str, outcome: Outcome) -> TensorReport:
    """The part of the report on one tensor."""
    _, entry = plan.checkpoint.tensors[name]
    return TensorReport(entry=entry, decision=plan.decisions[name], outcome=outcome)


def shard_fields(
    plan: PruningPlan, shard: Shard, outcomes: Mapping[str, Outcome]
) -> dict[str, TensorFields] | None:
    """The part of the report on the tensors of a shard; None if the outcomes are not theirs."""
    if outcomes.keys() != {entry.name for entry in shard.header.tensors}:
        return None
    return {name: tensor_report(plan, name, one).to_dict() for name, one in outcomes.items()}
