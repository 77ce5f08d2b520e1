"""Figures by matplotlib, which only those who draw have installed."""

import io
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emp_llm.errors import OptionError
from emp_llm.files.atomic import check_place, write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["check_drawing", "new_figure", "save_figure"]

_STYLE: dict[Any, Any] = {
    "pdf.fonttype": 42,  # text that can be searched and edited
    "svg.fonttype": "none",
    "svg.hashsalt": "emp-llm",  # else its identifiers differ from one run to the next
}
_DATES: dict[str, dict[str, Any]] = {
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None},
    ".svg": {"Date": None},
}


def check_drawing(path: Path, option: str, suffixes: Collection[str], example: str) -> None:
    """See that a figure can be drawn and written, before there is anything to draw.

    Args:
        path: Where to.
        option: What the path was given as, for the error.
        suffixes: Of the formats that it may have, in lower case.
        example: A name that it could have.

    Raises:
        OptionError: If matplotlib is not there, or the file's name is none of these formats.
        OutputError: If it could not be written.
    """
    if path.suffix.lower() not in suffixes:
        kinds = " or ".join(suffix[1:].upper() for suffix in suffixes)
        raise OptionError(
            f"{option} is {str(path)!r}; give the name of a {kinds} file, such as {example}"
        )
    check_place(path)
    _matplotlib()


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of a size in inches, with room for what is drawn around its axes.

    Raises:
        OptionError: If matplotlib is not there.
    """
    figure_class, canvas_class = _matplotlib()
    figure: Figure = figure_class(figsize=(width, height), layout="constrained")
    canvas_class(figure)
    return figure


def save_figure(figure: "Figure", path: Path, *, dpi: int) -> None:
    """Write a figure, the same bytes each time, in the place of an older file.

    Raises:
        OutputError: If it cannot be written.
    """
    from matplotlib import rc_context

    suffix = path.suffix.lower()
    data = io.BytesIO()
    with rc_context(_STYLE):
        figure.savefig(data, format=suffix[1:], dpi=dpi, facecolor="white", metadata=_DATES[suffix])
    write_whole(path, data.getvalue())


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise OptionError(
            "matplotlib is not installed, which figures are drawn with: "
            "run pip install 'emp-llm[report]'"
        ) from error
    return Figure, FigureCanvasAgg
