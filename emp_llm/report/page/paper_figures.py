"""A report as figures for a paper: the curve over β, decoder blocks, distributions over rows."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emp_llm.files.atomic import check_place
from emp_llm.report.fields import Report
from emp_llm.report.page.colours import GAUSSIAN, LINES, RAMP, shown_range
from emp_llm.report.page.content import (
    BlockContent,
    Histogram,
    KindContent,
    PageContent,
    page_content,
)
from emp_llm.report.plotting import check_drawing, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["check_figures", "figure_paths", "save_figures"]

_SUFFIXES = (".png", ".pdf", ".svg")
_PARTS = ("curve", "blocks", "rows")
_ONE_COLUMN, _TWO_COLUMNS = 3.4, 7.0  # inches, as in the styles of conferences
_DPI = 300
_SHAPES = {"sparsity": "-", "bytes": "--", "retained mass": ":"}
_MANY = 4  # histograms side by side
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
}


def figure_paths(path: Path) -> dict[str, Path]:
    """The files of a path: ``-curve``, ``-blocks`` and ``-rows`` go before its suffix."""
    return {part: path.with_name(f"{path.stem}-{part}{path.suffix}") for part in _PARTS}


def check_figures(path: Path) -> None:
    """Check that figures can be drawn and written, before any work is done for them.

    Raises:
        OptionError: If matplotlib is not installed, or the suffix is not .png, .pdf or .svg.
        OutputError: If they cannot be written.
    """
    check_drawing(path, "png", _SUFFIXES, "figures.png")
    for file in figure_paths(path).values():
        check_place(file)


def save_figures(report: Report, path: Path) -> list[Path]:
    """Draw a report: as PNG with 300 dots per inch, or as PDF or SVG with lines and text.

    The curve is one column wide, the others two. A report without a curve gives no such figure.

    Args:
        report: What `emp_llm.inspect` returns, or a folder's ``emp_report.json``.
        path: As `figure_paths` takes it.

    Returns:
        The files that were written.

    Raises:
        OptionError: If matplotlib is not installed.
        OutputError: If one cannot be written.
    """
    content = page_content(report)
    drawn = []
    for part, file in figure_paths(path).items():
        with _style():
            figure = _DRAW[part](content)
            if figure is not None:
                save_figure(figure, file, dpi=_DPI)
                drawn.append(file)
    return drawn


@contextmanager
def _style() -> Iterator[None]:
    new_figure(1, 1)  # says in one line that matplotlib is missing
    from matplotlib import rc_context

    with rc_context(_STYLE):
        yield


def _draw_curve(content: PageContent) -> "Figure | None":
    curve = content["curve"]
    if curve is None:
        return None
    figure = new_figure(_ONE_COLUMN, 2.4)
    axes = figure.subplots()
    targets = curve["parts"][0]
    columns = targets["sparsity"], targets["bytes_ratio"], targets["retained_mass"]
    for (name, color), column in zip(LINES.items(), columns, strict=True):
        shares = [100 * share for share in column]
        axes.plot(curve["beta"], shares, _SHAPES[name], color=color, label=name, linewidth=1.4)
    axes.axvline(content["rule"]["beta"], color="#888888", linewidth=0.6)
    axes.set(
        xlabel="β", ylabel="share of the targets, %", xlim=(0, curve["beta"][-1]), ylim=(0, 101)
    )
    axes.grid(axis="y")
    figure.legend(loc="outside upper center", ncols=3, handlelength=2.2, columnspacing=1.4)
    return figure


def _draw_blocks(content: PageContent) -> "Figure":
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import MaxNLocator
    from numpy import full, nan

    kinds, blocks = content["kinds"], content["blocks"]
    shares = full((len(kinds), len(blocks)), nan)
    for cell in content["cells"]:
        shares[cell["kind"], cell["block"]] = cell["n_eff_fraction_mean"]
    figure = new_figure(_TWO_COLUMNS, 0.8 + 0.2 * len(kinds))
    axes = figure.subplots()
    ramp = LinearSegmentedColormap.from_list("emp", RAMP[::-1])
    low, high = shown_range([cell["n_eff_fraction_mean"] for cell in content["cells"]])
    image = axes.imshow(
        shares, aspect="auto", cmap=ramp, interpolation="nearest", vmin=low, vmax=high
    )
    axes.set_yticks(range(len(kinds)), [_plain(kind["name"]) for kind in kinds])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    names = _block_names(blocks)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=20))
    axes.xaxis.set_major_formatter(
        lambda at, _: names[int(at)] if 0 <= at < len(names) and at == int(at) else ""
    )
    axes.set_xlabel("block")
    figure.colorbar(image, ax=axes, label=_FRACTION, pad=0.01, aspect=12).outline.set_visible(False)
    return figure


def _draw_rows(content: PageContent) -> "Figure":
    histograms = [kind["histogram"] for kind in content["kinds"]]
    lines = -(-len(histograms) // _MANY)
    figure = new_figure(_TWO_COLUMNS, 0.35 + 1.15 * lines)
    grid = figure.subplots(lines, min(_MANY, len(histograms)), sharex=True, squeeze=False)
    places: Sequence[Axes] = list(grid.flat)
    for axes, kind, histogram in zip(places, content["kinds"], histograms, strict=False):
        _draw_histogram(axes, kind, histogram["counts"])
    for axes in places[len(histograms) :]:
        axes.set_visible(False)
    places[0].set_xlim(*_occupied(histograms))
    figure.supxlabel(rf"{_FRACTION} (dashed: Gaussian weights, $2/\pi$)", fontsize=8)
    return figure


def _draw_histogram(axes: "Axes", kind: KindContent, counts: Sequence[int]) -> None:
    bins, total = len(counts), sum(counts)
    edges = [i / bins for i in range(bins + 1)]
    axes.stairs([100 * n / total for n in counts], edges, fill=True, color=RAMP[4])
    axes.axvline(GAUSSIAN, color=LINES["bytes"], linewidth=0.8, linestyle="--")
    axes.set_title(_plain(kind["name"]), loc="left")
    axes.set_title(f"{kind['n_eff_fraction_mean']:.4f}", loc="right", color="#666666")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:g}%")


def _occupied(histograms: Sequence[Histogram]) -> tuple[float, float]:
    """The part of the axis with filled bins, and one bin more on either side."""
    filled = [i for one in histograms for i, n in enumerate(one["counts"]) if n]
    bins = len(histograms[0]["counts"])
    return max(0, min(filled) - 1) / bins, min(bins, max(filled) + 2) / bins


def _block_names(blocks: Sequence[BlockContent]) -> list[str]:
    return ["" if block["number"] is None else str(block["number"]) for block in blocks]


def _plain(text: str) -> str:
    """A name with every $ escaped, by which matplotlib would begin a formula."""
    return text.replace("$", r"\$")


_FRACTION = r"$N_\mathrm{eff}\,/\,N$"
_DRAW = {"curve": _draw_curve, "blocks": _draw_blocks, "rows": _draw_rows}
