"""The report of a written folder, read with every check of its form."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emp_llm.companions import REPORT_NAME
from emp_llm.errors import FormatError, OptionError
from emp_llm.options import PruneOptions
from emp_llm.report import count_totals, told_rule
from emp_llm.report_form import read_report_file

__all__ = ["check_totals", "compare_totals", "read_report", "rule_options"]


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report of a folder; None if it has none.

    Raises:
        CheckpointError: If it cannot be read or is not JSON.
        FormatError: If it is not one that emp-llm wrote.
    """
    path = folder / REPORT_NAME
    return read_report_file(path) if path.is_file() else None


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


def rule_options(where: object, rule: Mapping[str, Any]) -> PruneOptions:
    """The options that stand for the rule that a folder was pruned by, but for its calibration.

    Args:
        where: What tells of the rule, for errors.
        rule: By the names that `emp_llm.report.rule_fields` uses.

    Raises:
        FormatError: If it is no rule, or one that this release does not know.
    """
    told = told_rule(rule)
    told.pop("calibration", None)
    ignore: list[Any] = told["ignore"] if isinstance(told["ignore"], list) else [None]
    texts = [value for name, value in told.items() if name not in ("beta", "ignore")] + ignore
    if type(told["beta"]) not in (int, float) or not all(isinstance(text, str) for text in texts):
        raise FormatError(
            f"{where}: tells of the rule {told}, which this emp-llm cannot derive from the source; "
            "use the release that wrote it"
        )
    try:
        return PruneOptions(**{**told, "ignore": tuple(ignore)})
    except OptionError as error:
        raise FormatError(f"{where}: tells of an impossible rule: {error}") from error
