"""Numbers for people, in tables that fit 80 columns."""

import shlex
from collections.abc import Iterable, Sequence
from textwrap import wrap
from typing import TYPE_CHECKING

from emp_llm.messages import printable
from emp_llm.options import NO_TARGETS
from emp_llm.report.prune_command import exact_beta, prune_words

if TYPE_CHECKING:
    from pathlib import Path

    from emp_llm.checkpoint.left_behind import LeftBehind
    from emp_llm.report.fields import FileCount, Report, TargetTotals, Trial
    from emp_llm.rule_fields import DataFields, RuleFields, SampleFields

__all__ = [
    "bytes_before",
    "calibrated_line",
    "cost_lines",
    "count",
    "file_lines",
    "found_lines",
    "pruned_kinds",
    "rule_in_short",
    "search_table",
    "show",
    "size",
    "some",
    "totals_line",
    "written_line",
]

_NAMED = 5
"""How many names are listed; the rest is counted."""

_COLUMNS = 80
_NO_BREAK = "\N{NO-BREAK SPACE}"  # at which no line is broken
_LARGE = 10_000_000
"""Bytes of copied files that are worth a line."""

_REPAIRED = {
    "obs": "the weights that stay",
    "swaps": "the weights that stay, and which of a row these are,",
    "bias": "biases of pruned layers",
}

Row = Sequence[str]


def size(nbytes: int) -> str:
    """Bytes with three digits and a decimal unit: 13.5 GB."""
    return _scaled(nbytes, ("B", "kB", "MB", "GB", "TB"))


def count(number: int) -> str:
    """A number with three digits and a decimal unit: 6.74 G."""
    return _scaled(number, ("", "k", "M", "G", "T"))


def some(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _scaled(number: int, units: Sequence[str]) -> str:
    value, unit = float(number), 0
    while value >= 999.5 and unit < len(units) - 1:
        value, unit = value / 1000, unit + 1
    digits = f"{value:.0f}" if unit == 0 or value >= 99.95 else f"{value:.3g}"
    return f"{digits} {units[unit]}".rstrip()


def show(title: str, header: Row, rows: Iterable[Row], *, left: int = 1, err: bool = False) -> None:
    """Print a table whose first `left` columns are text and the others numbers.

    Args:
        title: What stands above it.
        header: The names of its columns.
        rows: Its cells.
        left: How many columns are text.
        err: Whether it goes to stderr.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=printable(title), title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column, name in enumerate(header):
        is_text = column < left
        table.add_column(
            name,
            justify="left" if is_text else "right",
            no_wrap=not is_text,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*map(printable, row))
    Console(highlight=False, markup=False, stderr=err).print(table)


def pruned_kinds(report: "Report") -> None:
    """Print what pruning does to each kind of layer and to all targets, and the rest's size.

    Where the number of weights that stay is not that of their scores, N_eff of scores is left out.
    """
    from emp_llm.options import NO_TARGETS
    from emp_llm.report.totals import kinds, rest_totals

    if report["rule"]["targets"] == NO_TARGETS:
        return
    header = ("layer", "tensors", "weights", "N_eff/N", "sparsity", "mass", "bytes", "ratio")
    targets = report["totals"]["targets"]
    parts: dict[str, TargetTotals] = {**kinds(report), "all targets": targets}
    rows = [(kind, *_numbers(part)) for kind, part in parts.items()]
    rest = rest_totals(report)
    sizes = size(rest["bytes_after"]), f"{rest['bytes_ratio']:.3f}"
    rows.append(("the rest", f"{rest['tensors']}", count(rest["weights"]), "", "", "", *sizes))
    table = [header, *rows]
    if "count_by" in report["rule"]:
        table = [(*row[:3], *row[4:]) for row in table]
    show(_title(report), table[0], table[1:])


def _title(report: "Report") -> str:
    return f"{report['source']['model']}  {rule_in_short(report['rule'])}"


def rule_in_short(rule: "RuleFields") -> str:
    """The rule that weights were chosen by, for titles."""
    words = f"β = {rule['beta']:g}, {rule['granularity']} groups"
    if allocated := rule.get("allocate"):
        words += f", allocate {allocated}"
    if rule["criterion"] != "magnitude":
        words += f", {rule['criterion']}"
    return f"{words}, counted by {counted}" if (counted := rule.get("count_by")) else words


def search_table(report: "Report") -> None:
    """Print the steps of a search for β by the loss, if there was one."""
    tried = report.get("search")
    if not tried:
        return
    dense = next((one["loss"] for one in tried if one["beta"] is None), None)
    data = report.get("search_data")
    text = (data.get("text") if data else None) or "the calibration text"
    allowed = report.get("max_loss_increase")
    most = "" if allowed is None else f", to stay within {allowed:+g}%"
    header = ("β", "loss", "above dense", "perplexity")
    show(f"tried on {text}{most}", header, [_tried(one, dense) for one in tried], left=0)


def _tried(one: "Trial", dense: float | None) -> Row:
    beta = "dense" if one["beta"] is None else f"{one['beta']:g}"
    above = "" if one["beta"] is None or not dense else f"{one['loss'] / dense - 1:+.2%}"
    return beta, f"{one['loss']:.4f}", above, f"{one['perplexity']:,.2f}"


def found_lines(report: "Report") -> list[str]:
    """Lines that say how β was found, which data were used and what is missing, as far as any."""
    targets, rule = report["totals"]["targets"], report["rule"]
    lines = []
    base, in_base = report.get("base"), report.get("in_base")
    if base is not None and in_base is not None:
        lines.append(
            f"a delta to {base['model'].rpartition('/')[2]}: {in_base['tensors']} tensors "
            f"({size(in_base['bytes'])}) are as in the base, and not stored"
        )
    if report.get("target_sparsity") is not None or report.get("search"):
        lines.append(
            f"found: --beta {exact_beta(rule['beta'])}, with which {targets['kept']:,} of "
            f"{targets['weights']:,} weights stay"
        )
    data = rule.get("calibration")
    if data is not None and data.get("text") is not None:
        lines.append(calibrated_line(data))
    if rule.get("repair"):
        lines.append(f"repaired: {_REPAIRED[rule['repair']]} have changed")
    if steps := rule.get("recover"):
        lines.append(f"recovered: {steps} steps trained the weights that stay, norms and biases")
    if unreached := report.get("calibration", {}).get("without_tokens"):
        lines.append(f"ranked by magnitude, for no token reached them: {len(unreached)} matrices")
    if missing := report.get("missing"):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        lines.append(f"missing, so transformers initialises it: {missing[0]}{more}")
    return [printable(line) for line in lines]


def calibrated_line(data: "DataFields | SampleFields") -> str:
    """What was calibrated on."""
    fed = ", sequential" if data.get("sequential") else ""
    return (
        f"calibrated on {data.get('text')}: {data.get('samples')} × {data.get('length')} tokens, "
        f"seed {data.get('seed')}{fed}"
    )


def cost_lines(report: "Report", model: str, out: "Path") -> list[str]:
    """Lines that say what pruning without data costs, and name the command that repairs."""
    rule = report["rule"]
    uses_data = rule["criterion"] != "magnitude" or "calibration" in rule
    if uses_data or rule["targets"] == NO_TARGETS or "base" in report:
        return []
    words = prune_words(report, out=str(out), model=model)
    words += ["--calibration", "wikitext2", "--overwrite"]
    command = wrap(shlex.join(words), _COLUMNS - 4, break_long_words=False, break_on_hyphens=False)
    return [
        "Magnitude alone costs a real LLM much: SmolLM2-135M goes from perplexity 21.2",
        "to 42.9, repaired from data to 22.5, trained for a while to 21.9. To repair:",
        *(f"  {printable(line)} \\" for line in command[:-1]),
        f"  {printable(command[-1])}",
    ]


def file_lines(
    carried: "FileCount | None", left_behind: "Sequence[LeftBehind] | None"
) -> list[str]:
    """Lines of 80 columns on the files of a source that are copied and that are not, and why.

    Files that are copied are only worth a line if they are large, or others are not.
    """
    lines = []
    if carried is not None and (carried["bytes"] >= _LARGE or left_behind):
        files = "1 file" if carried["files"] == 1 else f"{carried['files']} files"
        lines.append(f"copied beside the weights: {files} ({size(carried['bytes'])})")
    reasons: dict[str, list[LeftBehind]] = {}
    for entry in left_behind or ():
        reasons.setdefault(entry["reason"], []).append(entry)
    for reason, entries in reasons.items():
        names, nbytes = [entry["path"] for entry in entries], sum(e["bytes"] for e in entries)
        line = printable(f"left behind, {reason}: {some(names)}")
        if nbytes:
            line += f" ({size(nbytes).replace(' ', _NO_BREAK)})"
        wrapped = wrap(line, _COLUMNS, subsequent_indent="  ", break_on_hyphens=False)
        lines += [part.replace(_NO_BREAK, " ") for part in wrapped]
    return lines


def _numbers(part: "TargetTotals") -> Row:
    return (
        f"{part['tensors']}",
        count(part["weights"]),
        f"{part['n_eff_fraction_mean']:.4f}",
        f"{part['sparsity']:.2%}",
        f"{part['retained_mass']:.3f}",
        size(part["bytes_after"]),
        f"{part['bytes_ratio']:.3f}",
    )


def totals_line(report: "Report") -> str:
    """The sizes and the sparsity of the whole model, in one line."""
    model, before = report["totals"]["model"], bytes_before(report)
    sizes = (
        f"whole model: {size(before)} → {size(model['bytes_after'])} "
        f"({model['bytes_after'] / max(before, 1):.3f})"
    )
    if report["rule"]["targets"] == NO_TARGETS:
        return f"{sizes}; every weight keeps every bit"
    weights = f"{count(model['weights'])}{' stored' if 'base' in report else ''} weights"
    return f"{sizes}, {model['sparsity']:.2%} of {weights} are zero"


def bytes_before(report: "Report") -> int:
    """Bytes of the source's tensors, with those that a delta does not store."""
    in_base = report.get("in_base")
    return report["totals"]["model"]["bytes_before"] + (in_base["bytes"] if in_base else 0)


def written_line(out: "Path", nbytes: int, seconds: float, peak_bytes: int) -> str:
    """How long writing took, and the memory it needed, in one line.

    Args:
        out: The folder that was written.
        nbytes: Bytes of the source's tensors.
        seconds: How long it took.
        peak_bytes: The most memory that it took.
    """
    rate = size(int(nbytes / seconds))
    return f"{out}: written in {seconds:.1f} s ({rate}/s), peak memory {size(peak_bytes)}"
