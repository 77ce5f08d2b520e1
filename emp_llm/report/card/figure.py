"""The figure of a model card, N_eff / N of decoder blocks × kinds of layer, as an SVG.

It is written as text without any library, the same bytes on every machine. It has a background of
its own, since the page around it may be light or dark.
"""

from collections.abc import Iterator
from html import escape
from pathlib import Path

from emp_llm.options import NO_TARGETS
from emp_llm.report.fields import Report
from emp_llm.report.file_names import FIGURE_NAME
from emp_llm.report.page.colours import ramp_at, shown_range
from emp_llm.report.page.content import map_content

__all__ = ["card_figure", "write_figure"]


_WIDTH, _MARGIN, _LINE, _TALL = 960, 24, 28, 25
_TOP, _BOTTOM = 62, 36
_LETTER = 7.3  # mean width in a font of 13 pixels
_LABELLED, _WRITTEN = 28, 60  # pixels that a block's number needs, and a cell's value
_DARK = 0.55  # from this share of the ramp on, text on it is light
_STYLE = (
    "text{font:13px system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif;"
    "fill:#59636c}.t{font-weight:600;font-size:15px;fill:#1a1f24}.k{fill:#04101a}.l{fill:#f4faf5}.b{text-anchor:middle}"
)


def card_figure(report: Report) -> str:
    """The figure of a report of `prune`, as the text of an SVG file."""
    content = map_content(report)
    kinds, blocks, cells = content["kinds"], content["blocks"], content["cells"]
    low, high = shown_range([cell["n_eff_fraction_mean"] for cell in cells])
    left = _MARGIN + 14 + _LETTER * max(len(kind["name"]) for kind in kinds)
    pitch = (_WIDTH - _MARGIN - left) / len(blocks)
    height = _TOP + _LINE * len(kinds) + _BOTTOM
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'width="{_WIDTH}" height="{height}" role="img">',
        "<title>N_eff / N of each block and kind of layer</title>",
        f"<style>{_STYLE}</style>",
        f'<rect width="{_WIDTH}" height="{height}" rx="10" fill="#fdfdfb"/>',
        f'<text class="t" x="{_MARGIN}" y="36">N_eff / N by block and kind of layer</text>',
        *_legend(low, high),
    ]
    for row, kind in enumerate(kinds):
        y = _TOP + _LINE * row + 17
        lines.append(f'<text class="k" x="{_MARGIN}" y="{y}">{escape(kind["name"])}</text>')
    for cell in cells:
        x, y = left + pitch * cell["block"], _TOP + _LINE * cell["kind"]
        value = cell["n_eff_fraction_mean"]
        lines += _cell(x, y, pitch, (high - value) / (high - low), value)
    every = next((n for n in (1, 2, 5, 10, 20, 50, 100) if n * pitch >= _LABELLED), 200)
    for place, block in enumerate(blocks):
        if block["number"] is not None and block["number"] % every == 0:
            lines.append(
                f'<text class="b" x="{left + pitch * (place + 0.5) - 1:.1f}" '
                f'y="{height - _BOTTOM + 16}">{block["number"]}</text>'
            )
    return "\n".join([*lines, "</svg>"]) + "\n"


def _cell(x: float, y: int, pitch: float, share: float, value: float) -> Iterator[str]:
    """A cell, and its value where there is room."""
    wide = pitch - min(2, pitch / 6)
    yield (
        f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{_TALL}" fill="{ramp_at(share)}"/>'
    )
    if pitch >= _WRITTEN:
        ink = "l" if share > _DARK else "k"
        yield f'<text class="b {ink}" x="{x + wide / 2:.1f}" y="{y + 17}">{value:.4f}</text>'


def _legend(low: float, high: float) -> Iterator[str]:
    """The ramp with its ends, at the right of the title."""
    wide, steps = 120, 24
    left, step = _WIDTH - _MARGIN - 52 - wide, wide / steps
    yield f'<text x="{left - 52}" y="35">{low:.4f}</text>'
    for i in range(steps):
        yield (
            f'<rect x="{left + i * step:g}" y="24" width="{step + 0.3:.1f}" height="12" '
            f'fill="{ramp_at(1 - (i + 0.5) / steps)}"/>'
        )
    yield f'<text x="{left + wide + 6}" y="35">{high:.4f}</text>'


def write_figure(folder: Path, report: Report) -> None:
    """Write the figure of a report into a folder, where the model card shows it.

    There is none where nothing was pruned.
    """
    if report["rule"]["targets"] == NO_TARGETS:
        return
    (folder / FIGURE_NAME).write_text(card_figure(report), encoding="utf-8")
