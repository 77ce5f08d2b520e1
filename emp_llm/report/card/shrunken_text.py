"""The text of the model card of a smaller model: how to load it, what is left, how it was made."""

import shlex
from collections.abc import Iterator, Mapping

from emp_llm.report.card.loading_code import ANY_NAME, loading_code
from emp_llm.report.card.text import code, one_line, table
from emp_llm.report.shrink_report import ShrinkReport

__all__ = ["describe_shrunken"]

_SIZES = ("", "source", "this model", "ratio")


def describe_shrunken(
    config: Mapping[str, object], report: ShrinkReport, figure: str | None
) -> str:
    """Write the section of a smaller model's card that is ours, in Markdown.

    Args:
        config: The content of the folder's ``config.json``.
        report: The folder's report.
        figure: The picture that lies beside the card; None if there is none.
    """
    lines = "\n".join(["```python", *loading_code(config, ANY_NAME), "```"])
    revision = report["source"]["revision"]
    at = f" at {code(revision)}" if revision else ""
    source = one_line(report["source"]["model"])
    command = shlex.join(["emp-llm", "shrink", source, *report["options"], "--out", "DIR"])
    parts = [
        f"# {source}, smaller",
        "This is an ordinary checkpoint: whatever loads the original model loads this one.",
        lines,
        "## How it was made",
        f"Made from {code(source)}{at} with emp-llm {report['emp_llm_version']}. "
        f"{'; '.join(_left(report))}{_data(report)}.\n{_unchanged(report)}",
        *_pruned_before(report),
        f"This command makes the same weights again:\n\n```\n{command}\n```",
        "## What is left",
        *([_showing(figure)] if figure else []),
        _sizes(report),
        "`emp_shrink.json` says which ones stay, with the scores of all.",
    ]
    return "\n\n".join(parts) + "\n"


def _left(report: ShrinkReport) -> Iterator[str]:
    """How many structures of each kind stay, and by what they were chosen."""
    for kind, fields in report["structures"].items():
        field = f" ({code(fields['field'])})" if fields["field"] else ""
        yield (
            f"{fields['kept']:,} of {fields['number']:,} {kind}{field} stay, "
            f"chosen by {code(fields['score'])}"
        )


def _data(report: ShrinkReport) -> str:
    """The samples that they were chosen on; nothing where there are none."""
    data = report.get("calibration")
    if data is None:
        return ""
    return (
        f", on {data.get('samples')} samples of {data.get('length')} tokens of "
        f"{code(data.get('text') or '')} (seed {data.get('seed')})"
    )


def _pruned_before(report: ShrinkReport) -> Iterator[str]:
    if (rule := report.get("source_rule")) is not None:
        yield (
            f"The source was pruned before, by β = {rule['beta']:g} in {rule['granularity']} "
            f"groups of {code(rule['targets'])}, ranked by {code(rule['criterion'])}: where its "
            "weights keep every bit, the zeros stay."
        )


def _unchanged(report: ShrinkReport) -> str:
    repaired = sum(fields.get("repaired", False) for fields in report["tensors"].values())
    if not repaired:
        return "Their weights keep every bit."
    tensors = "1 tensor was" if repaired == 1 else f"{repaired:,} tensors were"
    return (
        f"{tensors} changed to restore the outputs of the original model; all other weights keep "
        "every bit."
    )


def _showing(figure: str) -> str:
    return (
        f"![Scores of all structures, and which of them stay]({figure})\n\n"
        "Each cell is one of them, the darker the higher its score. Low cells are those that went."
    )


def _sizes(report: ShrinkReport) -> str:
    totals = report["totals"]
    sides = (
        ("tensors", totals["tensors_before"], totals["tensors_after"]),
        ("weights", totals["weights_before"], totals["weights_after"]),
        ("bytes", totals["bytes_before"], totals["bytes_after"]),
    )
    rows = [(name, f"{b:,}", f"{a:,}", f"{a / b:.3f}" if b else "") for name, b, a in sides]
    return table(_SIZES, rows, text_columns=1)
