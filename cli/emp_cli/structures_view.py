"""Prints the structures of a model, their scores and which of them stay, in 80 columns."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import typer

from emp_cli.tables import Row, calibrated_line, count, file_lines, rule_in_short, show, size, some
from emp_llm.messages import printable
from emp_llm.report.shrink_report import short_change

if TYPE_CHECKING:
    from emp_llm.entrypoints.structures import KindFields, ScoredHolder, StructuresReport
    from emp_llm.report.shrink_report import HolderFields, ShrinkReport, StructureFields, Tried

__all__ = ["show_shrunken", "show_structures"]

_HEADER = ("kind", "field of config.json", "in", "number")
_SCORES = ("lowest", "median", "highest", "N_eff")
_WIDEST = 16
"""Columns for what has gone: with more, a table of long names would not fit 80."""


def show_shrunken(report: "ShrinkReport") -> None:
    """Print how a model became smaller: tables, then lines."""
    _show_tried(report)
    _show_left(report)
    for line in (*file_lines(report["carried"], report["left_behind"]), *_shrunken_lines(report)):
        typer.echo(line)


def _show_left(report: "ShrinkReport") -> None:
    """Print a table of each kind of structures: a line for each holder that stays."""
    blocks = report["structures"].get("blocks")
    gone_blocks = [
        f"{name}.{block}."
        for name, holder in (blocks["holders"].items() if blocks else ())
        for block in set(range(blocks["number"] if blocks else 0)) - set(holder["kept"])
    ]
    for kind, fields in report["structures"].items():
        stay = f"{fields['kept']} of {fields['number']} stay"
        title = f"{report['source']['model']}  {kind} by {fields['score']}, {stay}"
        rows = [
            (name, f"{fields['number']}", *_scores(holder), _gone(fields, holder))
            for name, holder in fields["holders"].items()
            if not f"{name}.".startswith(tuple(gone_blocks))
        ]
        show(title, ("in", kind, *_SCORES, "gone"), rows)


def show_structures(report: "StructuresReport") -> None:
    """Print what can become fewer, a table of each kind that has scores, and what cannot."""
    kinds = report["structures"]
    rows = [
        (kind, fields["field"], _where(kind, fields), f"{fields['number']:,}")
        for kind, fields in kinds.items()
    ]
    show(f"{report['source']['model']}  what shrink can make fewer", _HEADER, rows, left=3)
    for kind, fields in kinds.items():
        if "score" in fields:
            _show_scores(kind, fields)
    if (data := report.get("calibration")) is not None:
        typer.echo(printable(calibrated_line(data)))
    for kind, why in report["refused"].items():
        typer.echo(printable(f"{kind} cannot become fewer: {why}"))


def _where(kind: str, fields: "KindFields") -> str:
    return "the model" if kind == "blocks" else f"each of {len(fields['holders'])} layers"


def _show_scores(kind: str, fields: "KindFields") -> None:
    """Print what the scores of each holder come to, and the mean of their effective numbers."""
    holders, n_eff = fields["holders"], fields.get("n_eff")
    rows: list[Row] = [("in", kind, *_SCORES)]
    rows += [(name, f"{fields['number']:,}", *_scores(holder)) for name, holder in holders.items()]
    if len(holders) > 1 and n_eff is not None:
        rows.append(("mean", "", "", "", "", f"{n_eff:,.2f}"))
    if not any("scores" in holder for holder in holders.values()):
        rows = [(*row[:2], row[-1]) for row in rows]
    show(f"{kind} by {fields['score']}", rows[0], rows[1:])


def _show_tried(report: "ShrinkReport") -> None:
    """Print what was tried to find which structures stay, or how many: a table of each kind."""
    text = report.get("calibration", {}).get("text") or "the calibration text"
    allowed = _value(report["options"], "--max-loss-increase")
    most = "" if allowed is None else f", to stay within +{allowed.removesuffix('.0')}%"
    for kind, fields in report["structures"].items():
        tried = fields.get("tried", [])
        whole = next((one["loss"] for one in tried if one["number"] is None), None)
        if tried:
            one_by_one = any("gone" in one for one in tried)
            header = (kind, "loss", "above all", "perplexity", *(["gone"] if one_by_one else []))
            rows = [[*_tried(one, whole), *_gone_last(one, one_by_one)] for one in tried]
            show(f"tried on {text}{most}", header, rows, left=0)


def _value(words: Sequence[str], option: str) -> str | None:
    """What an option was given, by words of the command line; None if it was not."""
    return words[words.index(option) + 1] if option in words[:-1] else None


def _tried(one: "Tried", whole: float | None) -> Row:
    number = "all" if one["number"] is None else f"{one['number']}"
    above = "" if one["number"] is None or not whole else f"{one['loss'] / whole - 1:+.2%}"
    return number, f"{one['loss']:.4f}", above, f"{one['perplexity']:,.2f}"


def _gone_last(one: "Tried", one_by_one: bool) -> Iterator[str]:
    if one_by_one:
        yield f"{one.get('gone', '')}"


def _scores(holder: "HolderFields | ScoredHolder") -> Sequence[str]:
    scores, n_eff = sorted(holder.get("scores", [])), holder.get("n_eff")
    found = (scores[0], scores[len(scores) // 2], scores[-1]) if scores else ()
    shown = [f"{one:.4g}" for one in found] or [""] * 3
    return (*shown, "" if n_eff is None else f"{n_eff:,.2f}")


def _gone(fields: "StructureFields", holder: "HolderFields") -> str:
    """The numbers of those that have gone, or how many if these would be too wide."""
    stays = set(holder["kept"])
    gone = [f"{i}" for i in range(fields["number"]) if i not in stays]
    words = ", ".join(gone)
    return words if len(words) <= _WIDEST else f"{len(gone):,} of them"


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
    matrices = "1 matrix that is" if repaired == 1 else f"{repaired} matrices that are"
    but = f", but for {matrices} repaired" if repaired else ""
    yield f"every weight that stays keeps every bit{but}"
    yield (
        f"whole model: {size(totals['bytes_before'])} → {size(totals['bytes_after'])} "
        f"({totals['bytes_ratio']:.3f}), {count(totals['weights_after'])} of "
        f"{count(totals['weights_before'])} weights are left"
    )
