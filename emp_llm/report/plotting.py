"""Figures by matplotlib, an optional dependency: it is imported when a figure is asked for."""

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
    "svg.hashsalt": "emp-llm",  # otherwise identifiers differ between runs
}
_DATES: dict[str, dict[str, str | None]] = {
    ".png": {"Software": None},
    ".pdf": {"CreationDate": None},
    ".svg": {"Date": None},
}


def check_drawing(path: Path, option: str, suffixes: Collection[str], example: str) -> None:
    """Check that a figure can be drawn and written, before any work is done for it.

    Args:
        path: The file to write.
        option: The option that gave the path, for the error.
        suffixes: Suffixes of the formats that can be written, in lower case.
        example: A valid name, for the error.

    Raises:
        OptionError: If matplotlib is not installed, or the file has another suffix.
        OutputError: If the file cannot be written.
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
        OptionError: If matplotlib is not installed.
    """
    figure_class, canvas_class = _matplotlib()
    figure: Figure = figure_class(figsize=(width, height), layout="constrained")
    canvas_class(figure)
    return figure


def save_figure(figure: "Figure", path: Path, *, dpi: int) -> None:
    """Write a figure in place of an older file; equal figures give equal bytes.

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
