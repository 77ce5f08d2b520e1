"""A row of the paper: measured, kept as JSON, drawn, and printed beside the authors' figures."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PICTURES = ROOT / "docs" / "figures"
SEEDS = (0, 1, 2, 3, 4)

Run = dict[str, Any]
"""What was found with one seed: numbers by their names, as JSON holds them."""

# the palette of Okabe and Ito, which colour-blind readers can tell apart
ORANGE, BLUE, GREEN, PINK, GREY = "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#777777"

_STUDENT_T = {5: 2.776}
"""Half the width of a 95 % interval of a mean, in standard errors, by the number of values."""


@dataclass(frozen=True)
class Line:
    """A line of the table: a value for each run, EMP's and that of a fixed share of equal size."""

    what: str
    sparsity: Sequence[float]
    dense: Sequence[float]
    emp: Sequence[float]
    fixed: Sequence[float]
    authors: str = ""
    lower_is_better: bool = False
    decimals: int = 1

    def cells(self) -> list[str]:
        """The line as text, a cell for each column."""
        values = (self.dense, self.emp, self.fixed)
        shown = [spread(v, self.decimals) for v in values]
        return [self.what, spread(self.sparsity, 1), *shown, self.verdict(), self.authors]

    def verdict(self) -> str:
        """How far EMP is from the fixed share, run by run, and whether that could be chance."""
        gaps = [a - b for a, b in zip(self.emp, self.fixed, strict=True)]
        told = spread(gaps, self.decimals, sign="+")
        if len(gaps) not in _STUDENT_T or not any(gaps):
            return told
        sure = abs(mean(gaps)) > _STUDENT_T[len(gaps)] * stdev(gaps) / len(gaps) ** 0.5
        better = (mean(gaps) < 0) == self.lower_is_better
        return f"{told} {('better' if better else 'worse') if sure else 'unclear'}"


@dataclass(frozen=True)
class Row:
    """A row of the paper; `measure` makes a run of a seed, the others tell of all runs."""

    name: str
    title: str
    measure: Callable[[int], Run]
    lines: Callable[[list[Run]], list[Line]]
    draw: Callable[[Figure, list[Run]], None]
    notes: Callable[[list[Run]], list[str]] = lambda _runs: []
    seeds: Sequence[int] = SEEDS
    picture: str = "svg"
    size: tuple[float, float] = (11, 3.6)


def spread(values: Sequence[float], decimals: int = 1, *, sign: str = "") -> str:
    """The mean, and the sample standard deviation if there are several values."""
    told = f"{mean(values):{sign}.{decimals}f}"
    return f"{told} ± {stdev(values):.{decimals}f}" if len(values) > 1 else told


def table(row: Row, runs: list[Run]) -> str:
    """The lines of a row under a heading, and what else is to be said."""
    header = ["", "sparsity %", "dense", "EMP", "fixed share", "EMP - fixed share", "the authors"]
    lines = [header, *(line.cells() for line in row.lines(runs))]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    told = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([row.title, *told, *row.notes(runs)])


def run(*rows: Row) -> None:
    """Measure rows, a process for each core; keep the results, draw them and print the table."""
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        waiting = [(row, [pool.submit(row.measure, seed) for seed in row.seeds]) for row in rows]
        for row, futures in waiting:
            runs = [future.result() for future in futures]
            print(f"{row.name}: done", file=sys.stderr, flush=True)
            keep(row, runs)
            save_picture(row, runs)
    print("\n\n".join(table(row, load(row)) for row in rows))


def keep(row: Row, runs: list[Run]) -> None:
    """Write the results of a row, a line for each run."""
    packages = ("torch", "numpy", "scikit-learn", "scikit-image", "transformers")
    versions = json.dumps({package: version(package) for package in packages})
    told = ",\n  ".join(json.dumps(_rounded(run), separators=(",", ":")) for run in runs)
    text = f'{{\n "row": "{row.name}",\n "versions": {versions},\n "runs": [\n  {told}\n ]\n}}\n'
    (RESULTS / f"paper_{row.name}.json").write_text(text, encoding="utf-8")


def load(row: Row) -> list[Run]:
    """The runs that are kept of a row."""
    kept = json.loads((RESULTS / f"paper_{row.name}.json").read_text(encoding="utf-8"))
    return list(kept["runs"])


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, 5) if isinstance(value, float) else value


# --- pictures ------------------------------------------------------------------------------------


def save_picture(row: Row, runs: list[Run]) -> None:
    """Draw a row; equal results give equal bytes."""
    figure = Figure(figsize=row.size, layout="constrained")
    row.draw(figure, runs)
    date = {"Date": None} if row.picture == "svg" else {"Software": None}
    PICTURES.mkdir(parents=True, exist_ok=True)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "paper"}):
        path = PICTURES / f"paper_{row.name}.{row.picture}"
        figure.savefig(path, dpi=100, facecolor="white", metadata=date)


def curve(
    axes: Axes,
    points: Iterable[Sequence[Run]],
    x: str = "sparsity",
    y: str = "accuracy",
    **style: object,
) -> None:
    """A line through the means of runs, with a band of their deviation; of each point, its runs."""
    across, middle, low, high = [], [], [], []
    for costs in points:
        values = [cost[y] for cost in costs]
        width = stdev(values) if len(values) > 1 else 0.0
        across.append(mean(cost[x] for cost in costs))
        middle.append(mean(values))
        low.append(middle[-1] - width)
        high.append(middle[-1] + width)
    axes.plot(across, middle, **style)
    axes.fill_between(across, low, high, color=style["color"], alpha=0.15, linewidth=0)


def finish(axes: Axes, **labels: object) -> None:
    """Labels, a light grid, and no frame above and to the right."""
    axes.set(**labels)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
