"""The figure of a smaller model's card: the scores of all structures, and which stay, as an SVG.

A line for each decoder block that holds structures, or one for the decoder blocks of the model; a
cell for each structure. Those that went are low cells. It is written as text without any library,
the same bytes on every machine.
"""

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

from emp_llm.report.file_names import SHRINK_FIGURE_NAME
from emp_llm.report.page.colours import ramp_at, shown_range
from emp_llm.report.shrink_report import HolderFields, ShrinkReport, StructureFields

__all__ = ["shrunken_figure", "write_shrunken_figure"]

_WIDTH, _MARGIN, _TITLE, _LINE, _TALL = 960, 24, 44, 20, 16
_LETTER = 7.3  # mean width in a font of 13 pixels
_LOW = 4  # height of a cell of what went
_MOST = 512
"""Structures in a line; cells of more would be narrower than two pixels."""

_STYLE = (
    "text{font:13px system-ui,-apple-system,'Segoe UI',Roboto,Helvetica,Arial,sans-serif;"
    "fill:#59636c}.t{font-weight:600;font-size:15px;fill:#1a1f24}"
)


def shrunken_figure(report: ShrinkReport) -> str | None:
    """The figure of a report, as the text of an SVG file; None if there are no scores to show."""
    lines, y = list[str](), _MARGIN
    for kind, fields in report["structures"].items():
        # blocks that go have no scores of what is chosen behind them
        scored = {name: one for name, one in fields["holders"].items() if "scores" in one}
        if scored and fields["number"] <= _MOST:
            lines += _kind(kind, fields, scored, y)
            y += _TITLE + _LINE * len(scored)
    if not lines:
        return None
    height = y + _MARGIN // 2
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
            f'width="{_WIDTH}" height="{height}" role="img">',
            "<title>Scores of all structures, and which of them stay</title>",
            f"<style>{_STYLE}</style>",
            f'<rect width="{_WIDTH}" height="{height}" rx="10" fill="#fdfdfb"/>',
            *lines,
            "</svg>\n",
        ]
    )


def _kind(
    kind: str, fields: StructureFields, holders: Mapping[str, HolderFields], top: int
) -> Iterator[str]:
    """The title of one kind of structures, and the lines of some holders."""
    low, high = shown_range([score for one in holders.values() for score in one["scores"]])
    title = f"{kind} by {fields['score']}: {fields['kept']} of {fields['number']} stay"
    yield f'<text class="t" x="{_MARGIN}" y="{top + 14}">{escape(title)}</text>'
    left = _MARGIN + 12 + _LETTER * max(map(len, holders))
    pitch = (_WIDTH - _MARGIN - left) / fields["number"]
    for row, (name, holder) in enumerate(holders.items()):
        y = top + _TITLE - 14 + row * _LINE
        yield f'<text x="{_MARGIN}" y="{y + 13}">{escape(name)}</text>'
        yield from _cells(holder, left, y, pitch, (low, high))


def _cells(
    holder: HolderFields, left: float, top: int, pitch: float, ends: tuple[float, float]
) -> Iterator[str]:
    stays, (low, high) = set(holder["kept"]), ends
    wide = pitch - min(2, pitch / 6)
    for number, score in enumerate(holder["scores"]):
        tall = _TALL if number in stays else _LOW
        colour = ramp_at((score - low) / (high - low))
        yield (
            f'<rect x="{left + pitch * number:.1f}" y="{top + _TALL - tall}" width="{wide:.1f}" '
            f'height="{tall}" fill="{colour}"/>'
        )


def write_shrunken_figure(folder: Path, report: ShrinkReport) -> None:
    """Write the figure of a report, if it has any, into a folder, for the model card."""
    figure = shrunken_figure(report)
    if figure is not None:
        (folder / SHRINK_FIGURE_NAME).write_text(figure, encoding="utf-8")
