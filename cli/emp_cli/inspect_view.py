"""Prints a report in 80 columns: tables, bars and a map.

Everything can be read without colour, and on terminals that know only ASCII.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emp_cli.tables import (
    count,
    file_lines,
    found_lines,
    rule_in_short,
    search_table,
    size,
    totals_line,
)
from emp_llm.messages import printable
from emp_llm.options import NO_TARGETS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from emp_llm.report.fields import Report, TargetTotals

__all__ = ["report_with_parts", "show_report"]

_MAP_CELLS = 64
"""Columns of a map, at most; with more blocks each cell stands for several."""

_LEAST_SPAN = 0.02
"""The smallest range of sparsity that a map spreads its marks over: less is noise."""

_BAR = 20
_CURVE = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
_ROWS = 5
_RAMP = ("#4575b4", "#74add1", "#abd9e9", "#e0e0a0", "#fdae61", "#f46d43", "#d73027", "#a50026")


@dataclass(frozen=True)
class _Signs:
    """The characters that a terminal can show.

    Attributes:
        levels: Eight marks, from the lowest to the highest.
        bar: A full cell of a bar, its eighths, and an empty cell.
        spell: Replaces characters of a text that the terminal cannot show.
    """

    levels: str
    bar: tuple[str, str, str]
    spell: Callable[[str], str]


_FULL = _Signs("▁▂▃▄▅▆▇█", ("█", "▏▎▍▌▋▊▉", "·"), str)
_SPELLED = {"β": "beta", "→": "->", "≥": ">=", "–": "-", "…": "...", "×": "x"}
_ASCII = _Signs(
    "01234567",
    ("#", "", "."),
    lambda text: "".join(_SPELLED.get(c, c) for c in text),
)


def report_with_parts(report: "Report") -> dict[str, object]:
    """A report for programs: with its totals by kind of layer, and by block and kind."""
    from emp_llm.report.totals import cells, kinds

    blocks = [
        {"block": block, "kind": kind, **totals} for (block, kind), totals in cells(report).items()
    ]
    return {**report, "kinds": kinds(report), "blocks": blocks}


def show_report(report: "Report") -> None:
    """Print what a report says, of `emp_llm.inspect` or of a written folder."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if console.width > 100:  # numbers far from their names are hard to read
        console.width = 100
    signs = _FULL if console.encoding.lower().startswith("utf") else _ASCII
    view = _View(console, signs, report)
    if report["rule"]["targets"] == NO_TARGETS:
        view.lossless()
    else:
        view.kinds()
        view.found()
        view.block_map()
        view.curve()
        view.standing_out()
    view.left_alone()
    view.files()
    view.totals()


class _View:
    def __init__(self, console: "Console", signs: _Signs, report: "Report") -> None:
        self._console = console
        self._signs = signs
        self._report = report

    def lossless(self) -> None:
        """That nothing is pruned."""
        done = "packed without loss" if self._report["format"] == "packed" else "nothing pruned"
        self._say(f"{self._report['source']['model']}  {done}", bold=True)
        self._console.print()

    def kinds(self) -> None:
        """Each kind of layer, and all of them."""
        from emp_llm.report.totals import kinds

        targets = self._report["totals"]["targets"]
        title = f"{self._report['source']['model']}  {rule_in_short(self._report['rule'])}"
        self._say(f"{title}, {count(targets['weights'])} weights in targets", bold=True)
        self._console.print()
        bounded = targets["retained_mass_bound"] is not None
        # N_eff of scores says nothing where magnitudes were counted
        counted = "count_by" not in self._report["rule"]
        header = ["layer", *(["N_eff/N", "from – to"] if counted else []), "sparsity", "mass"]
        size_of = self._report["format"]
        table = self._table([*header, *(["at least"] if bounded else []), size_of, "ratio"])
        parts: dict[str, TargetTotals] = {**kinds(self._report), "all targets": targets}
        for name, part in parts.items():
            least, most = part["n_eff_fraction_min"], part["n_eff_fraction_max"]
            n_eff = [f"{part['n_eff_fraction_mean']:.4f}", f"{least:.2f} – {most:.2f}"]
            row = [name, *(n_eff if counted else [])]
            row += [f"{part['sparsity']:.2%}", f"{part['retained_mass']:.3f}"]
            if bounded:
                bound = part["retained_mass_bound"]
                row.append("" if bound is None else f"{bound:.3f}")
            row += [size(part["bytes_after"]), f"{part['bytes_ratio']:.3f}"]
            self._add(table, row)
        self._console.print(table)
        self._console.print()

    def found(self) -> None:
        """How β was found, and which data were used."""
        search_table(self._report)
        if lines := found_lines(self._report):
            for line in lines:
                self._say(line)
            self._console.print()

    def block_map(self) -> None:
        """The sparsity of each block and kind of layer, a mark for each."""
        from rich.text import Text

        from emp_llm.report.totals import cells, sparsity_of

        parts = cells(self._report)
        blocks = list(dict.fromkeys(block for block, _ in parts))
        kinds = sorted({kind for _, kind in parts})
        if len(blocks) < 2:
            return
        step = -(-len(blocks) // _MAP_CELLS)
        wide = 2 if 2 * len(blocks) <= _MAP_CELLS else 1
        bins = [blocks[i : i + step] for i in range(0, len(blocks), step)]
        means = {
            kind: [
                sparsity_of(parts[block, kind] for block in part if (block, kind) in parts)
                for part in bins
            ]
            for kind in kinds
        }
        known = [mean for line in means.values() for mean in line if mean is not None]
        low = min(known)
        high = max(*known, low + _LEAST_SPAN)
        each = "" if step == 1 else f" ({step} in each mark)"
        last = blocks[-1] or "outside of them"
        self._say(f"sparsity by decoder block{each}, from {blocks[0]} to {last}")
        name_width = min(max(map(len, kinds)), 24)
        for kind, line in means.items():
            text = Text(f" {_fitted(kind, name_width)}  ")
            for mean in line:
                self._mark(text, mean, low, high, wide)
            self._console.print(text, no_wrap=True, crop=True)
        self._console.print(self._scale(low, high, name_width))
        self._console.print()

    def curve(self) -> None:
        """What other values of β would give."""
        curve = self._report.get("curve")
        if curve is None:
            if "curve" in self._report and self._report["rule"]["granularity"] != "row":
                self._say("other β: counted for row groups only (--granularity row)")
                self._console.print()
            return
        totals = self._report["totals"]
        rest = totals["model"]["bytes_after"] - totals["targets"]["bytes_after"]
        betas, asked = curve["beta"], self._report["rule"]["beta"]
        shown = [b for b in sorted({*_CURVE, asked}) if b in betas]
        self._say("sparsity and size at each β; bars are bytes of the whole model, packed")
        table = self._table(["β", "sparsity", "mass", "targets", "model", "ratio", ""])
        for beta in dict.fromkeys([*shown, betas[-1]]):
            at, targets = betas.index(beta), curve["targets"]
            model = rest + targets["bytes"][at]
            ratio = model / totals["model"]["bytes_before"]
            row = [f"{beta:g}", f"{targets['sparsity'][at]:.2%}"]
            row += [f"{targets['retained_mass'][at]:.3f}", size(targets["bytes"][at])]
            row += [size(model), f"{ratio:.3f}"]
            self._add(table, row, self._bar(ratio), bold=beta == asked)
        self._console.print(table)
        self._console.print()

    def standing_out(self) -> None:
        """The first of the rows that stand out, and how many there are."""
        if "standing_out" not in self._report:
            return
        counts, rows = self._report["standing_out_counts"], self._report["standing_out"]
        found = [f"{number:,} {why}" for why, number in counts.items() if number]
        if not found:
            self._say("no row stands out: none is dead, uniform or dominated by a few weights")
            self._console.print()
            return
        more = "; the worst" if len(rows) > _ROWS else ""
        number = sum(counts.values())
        rows_stand = "row stands" if number == 1 else "rows stand"
        self._say(f"{number:,} {rows_stand} out ({', '.join(found)}){more}:")
        table = self._table(["tensor", "row", "N_eff/N", "mass/median", "why"], text=(0, 4))
        for row in rows[:_ROWS]:
            figures = [f"{row['row']}", f"{row['n_eff_fraction']:.4f}", f"{row['mass_ratio']:.2g}"]
            self._add(table, [row["tensor"], *figures, row["why"]])
        self._console.print(table)
        self._console.print()

    def left_alone(self) -> None:
        """Why the other tensors are not pruned, and what they take."""
        from emp_llm.report.totals import left_alone

        reasons = left_alone(self._report)
        if not reasons:
            return
        table = self._table(["not pruned, because", "tensors", "bytes", "stored", "ratio"])
        for reason, part in reasons.items():
            share = f"{part['bytes_after'] / part['bytes']:.3f}" if part["bytes"] else ""
            sizes = [size(part["bytes"]), size(part["bytes_after"]), share]
            self._add(table, [reason, f"{len(part['names'])}", *sizes])
        self._console.print(table)
        self._console.print()

    def files(self) -> None:
        """The files of the source that are copied, and those that are not."""
        beside = file_lines(self._report.get("carried"), self._report.get("left_behind"))
        for line in beside:
            self._say(line)
        if beside:
            self._console.print()

    def totals(self) -> None:
        """The sizes and the sparsity of the whole model."""
        self._say(totals_line(self._report))
        files = self._report["totals"].get("files")
        if files is not None:
            self._say(
                f"files of weights: {files['bytes_before']:,} bytes → {files['bytes_after']:,} "
                f"packed, {files['bytes_dense']:,} dense"
            )

    def _say(self, text: str, *, bold: bool = False) -> None:
        line = self._signs.spell(printable(text))
        self._console.print(line, style="bold" if bold else None, soft_wrap=False)

    def _table(self, header: Sequence[str], *, text: Sequence[int] = (0,)) -> "Table":
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
        for column, name in enumerate(header):
            is_text = column in text
            table.add_column(
                self._signs.spell(name),
                justify="left" if is_text or not name else "right",
                no_wrap=not is_text,
                overflow="fold",
            )
        return table

    def _add(self, table: "Table", row: Sequence[str], *more: "Text", bold: bool = False) -> None:
        cells = (self._signs.spell(printable(cell)) for cell in row)
        table.add_row(*cells, *more, style="bold" if bold else None)

    def _bar(self, share: float) -> "Text":
        """A bar, full at a share of 1."""
        from rich.text import Text

        full, parts, empty = self._signs.bar
        eighths = round(min(share, 1.0) * _BAR * 8)
        bar = full * (eighths // 8)
        bar += parts[eighths % 8 - 1] if parts and eighths % 8 else ""
        return Text(bar, style="cyan").append(empty * (_BAR - len(bar)), style="dim")

    def _mark(self, text: "Text", value: float | None, low: float, high: float, wide: int) -> None:
        if value is None:
            text.append(" " * wide)
            return
        level = min(int((value - low) / (high - low) * 8), 7)
        text.append(self._signs.levels[level] * wide, style=_RAMP[level])

    def _scale(self, low: float, high: float, indent: int) -> "Text":
        """What the marks of a map mean."""
        from rich.text import Text

        text = Text(f" {'':{indent}}  {low:.1%} ")
        for level in range(8):
            text.append(self._signs.levels[level], style=_RAMP[level])
        return text.append(f" {high:.1%}")


def _fitted(name: str, width: int) -> str:
    """A name in so many columns; of a longer name the end, which says more than the beginning."""
    name = printable(name)
    return f"{name:{width}}" if len(name) <= width else f"..{name[2 - width :]}"
