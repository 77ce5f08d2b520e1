"""Prints the structures of a model, their scores and which of them stay, in 80 columns."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import typer

from emp_cli.tables import Row, calibrated_line, count, file_lines, rule_in_short, show, size, some
from emp_llm.messages import printable
from emp_llm.report.shrink_report import short_change

if TYPE_CHECKING:
    from emp_llm.entrypoints.structures import StructuresReport
    from emp_llm.report.shrink_report import HolderFields, ShrinkReport, StructureFields, Tried

__all__ = ["show_shrunken", "show_structures"]

_WIDEST = 16
"""Columns for what has gone: with more, a table of long names would not fit 80."""


def show_shrunken(report: "ShrinkReport") -> None:
    """Print how a model became smaller: tables, then lines."""
    _show_tried(report)
    show_structures(report)
    for line in (*file_lines(report["carried"], report["left_behind"]), *_shrunken_lines(report)):
        typer.echo(line)


def show_structures(report: "ShrinkReport | StructuresReport") -> None:
    """Print a table of each kind of structures: a line for each holder that stays."""
    blocks = report["structures"].get("blocks")
    gone_blocks = [
        f"{name}.{block}."
        for name, holder in (blocks["holders"].items() if blocks else ())
        for block in set(range(blocks["number"] if blocks else 0)) - set(holder["kept"])
    ]
    for kind, fields in report["structures"].items():
        left = fields["kept"] < fields["number"]
        stay = f", {fields['kept']} of {fields['number']} stay" if left else ""
        title = f"{report['source']['model']}  {kind} by {fields['score']}{stay}"
        header = ("in", kind, "lowest", "median", "highest", "N_eff", *(("gone",) if left else ()))
        rows = [
            (name, f"{fields['number']}", *_scores(holder), *_gone(fields, holder, left))
            for name, holder in fields["holders"].items()
            if not f"{name}.".startswith(tuple(gone_blocks))
        ]
        show(title, header, rows)


def _show_tried(report: "ShrinkReport") -> None:
    """Print what was tried to find which structures stay, or how many: a table of each kind."""
    text = report.get("calibration", {}).get("text") or "the calibration text"
    for kind, fields in report["structures"].items():
        tried = fields.get("tried", [])
        whole = next((one["loss"] for one in tried if one["number"] is None), None)
        if tried:
            one_by_one = any("gone" in one for one in tried)
            header = (kind, "loss", "above all", "perplexity", *(["gone"] if one_by_one else []))
            rows = [[*_tried(one, whole), *_gone_last(one, one_by_one)] for one in tried]
            show(f"tried on {text}", header, rows, left=0)


def _tried(one: "Tried", whole: float | None) -> Row:
    number = "all" if one["number"] is None else f"{one['number']}"
    above = "" if one["number"] is None or not whole else f"{one['loss'] / whole - 1:+.2%}"
    return number, f"{one['loss']:.4f}", above, f"{one['perplexity']:,.2f}"


def _gone_last(one: "Tried", one_by_one: bool) -> Iterator[str]:
    if one_by_one:
        yield f"{one.get('gone', '')}"


def _scores(holder: "HolderFields") -> Sequence[str]:
    scores = sorted(holder.get("scores", []))
    if not scores:
        return ("",) * 4
    middle = scores[len(scores) // 2]
    n_eff = holder.get("n_eff")
    shown = [f"{one:.4g}" for one in (scores[0], middle, scores[-1])]
    return (*shown, "" if n_eff is None else f"{n_eff:.2f}")


def _gone(fields: "StructureFields", holder: "HolderFields", left: bool) -> Iterator[str]:
    """The numbers of those that have gone, or how many if these would be too wide."""
    if left:
        stays = set(holder["kept"])
        gone = [f"{i}" for i in range(fields["number"]) if i not in stays]
        words = ", ".join(gone)
        yield words if len(words) <= _WIDEST else f"{len(gone):,} of them"


def _shrunken_lines(report: "ShrinkReport") -> Iterator[str]:
    """What has changed, and how large the model is."""
    if (rule := report.get("source_rule")) is not None:
        yield f"the source was pruned before: {rule_in_short(rule)}"
    if (data := report.get("calibration")) is not None:
        yield printable(calibrated_line(data))
    for field, change in report["config"].items():
        yield printable(f"config.json: {field} {short_change(change)}")
    if left_out := report["left_out"]:
        yield printable(f"left out, since the model has no place for them: {some(left_out)}")
    totals = report["totals"]
    repaired = sum(one.get("repaired", False) for one in report["tensors"].values())
    yield (
        f"whole model: {size(totals['bytes_before'])} → {size(totals['bytes_after'])} "
        f"({totals['bytes_ratio']:.3f}), {count(totals['weights_after'])} of "
        f"{count(totals['weights_before'])} weights are left, every bit of them"
        + (f" but for {repaired} repaired matrices" if repaired else "")
    )
