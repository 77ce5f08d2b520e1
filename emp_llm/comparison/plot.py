"""A figure of a comparison: perplexity over sparsity, and each control relative to EMP."""

from pathlib import Path
from typing import TYPE_CHECKING

from emp_llm.comparison.costs import Comparison, Method
from emp_llm.report.plotting import check_drawing, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["check_plot", "save_plot"]

# the palette of Okabe and Ito, which colour-blind readers can tell apart, and a marker for each
_STYLES: dict[Method, tuple[str, str, str]] = {
    "emp": ("EMP", "#D55E00", "o"),
    "magnitude-row": ("magnitude, same share of every row", "#0072B2", "s"),
    "magnitude-layer": ("magnitude, same share of every layer", "#009E73", "^"),
    "pq-index": ("PQ index (Diao et al. 2023)", "#CC79A7", "D"),
    "random": ("random", "#777777", "x"),
    "wanda": ("scores of wanda", "#F0E442", "v"),
    "obs": ("scores of obs", "#56B4E9", "P"),
    "emp-repaired": ("EMP, repaired", "#E69F00", "*"),
    "obs-repaired": ("scores of obs, repaired", "#000000", "X"),
}


def check_plot(path: Path) -> None:
    """Check that a picture can be drawn and written, before the work for it begins.

    Raises:
        OptionError: If matplotlib is not installed, or the file's name does not end in .png.
        OutputError: If there is no folder to write it to.
    """
    check_drawing(path, "plot", (".png",), "costs.png")


def save_plot(comparison: Comparison, path: Path) -> None:
    """Draw a comparison into a PNG file.

    The left part has perplexity over sparsity, with the dense model as a horizontal line; the right
    one by how many percent the perplexity of each control but the random one is above EMP's.

    Raises:
        OptionError: If matplotlib is not installed.
        OutputError: If the file cannot be written.
    """
    figure = new_figure(11, 4.6)
    left, right = figure.subplots(1, 2)
    _draw_perplexities(left, comparison)
    _draw_differences(right, comparison)
    settings = comparison.settings
    figure.suptitle(
        f"{comparison.source['model']}: perplexity of {settings['text']}, "
        f"windows of {settings['context']}"
    )
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    save_figure(figure, path, dpi=150)


def _draw_perplexities(axes: "Axes", comparison: Comparison) -> None:
    dense = comparison.dense.perplexity
    axes.axhline(dense, color="black", linestyle="--", linewidth=1, label=f"dense: {dense:.2f}")
    for method, (name, color, marker) in _STYLES.items():
        costs = [cost for cost in comparison.costs if cost.method == method]
        points = sorted((100 * cost.sparsity, cost.perplexity) for cost in costs)
        if points:
            axes.plot(*zip(*points, strict=True), label=name, color=color, marker=marker)
    axes.set(yscale="log", ylabel="perplexity")
    _share_axis(axes)


def _draw_differences(axes: "Axes", comparison: Comparison) -> None:
    axes.axhline(0, color=_STYLES["emp"][1], linewidth=1.5)
    for method, (_, color, marker) in _STYLES.items():
        costs = [cost for cost in comparison.costs if cost.method == method]
        points = [(100 * c.sparsity, 100 * c.above(comparison.emp(c.beta))) for c in costs]
        if points and method not in ("emp", "random"):
            axes.plot(*zip(*sorted(points), strict=True), color=color, marker=marker)
    axes.set(ylabel="perplexity above EMP's, %")
    _share_axis(axes)


def _share_axis(axes: "Axes") -> None:
    axes.set(xlabel="sparsity of the targets, %")
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
