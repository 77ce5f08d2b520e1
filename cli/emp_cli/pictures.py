"""The page and the figures of a report, which `inspect` and `report` write on request."""

from pathlib import Path
from typing import TYPE_CHECKING

from emp_llm.errors import OptionError

if TYPE_CHECKING:
    from emp_llm.report.fields import Report

__all__ = ["check_pictures", "write_pictures"]


def check_pictures(html: Path | None, png: Path | None) -> None:
    """Check that they can be drawn and written, before the work for them begins."""
    if html is not None:
        from emp_llm.report.page.page import check_page

        check_page(html)
    if png is not None:
        from emp_llm.report.page.paper_figures import check_figures

        check_figures(png)


def write_pictures(
    report: "Report", html: Path | None, png: Path | None, *, model: str | None = None
) -> list[str]:
    """Write those that are asked for, replacing older ones; returns a line for each.

    Args:
        report: What they show.
        html: The page.
        png: The path that the figures' names are derived from.
        model: The model as the page's command names it; by default as the report does.

    Raises:
        OptionError: If one is asked for, and nothing was pruned.
    """
    from emp_cli.tables import size
    from emp_llm.options import NO_TARGETS

    if (html or png) and report["rule"]["targets"] == NO_TARGETS:
        raise OptionError(
            f"{report['source']['model']}: nothing is pruned, so there is nothing to draw: leave "
            "--html and --png out"
        )
    paths = []
    if html is not None:
        from emp_llm.report.page.page import write_page

        write_page(report, html, model=model)
        paths.append(html)
    if png is not None:
        from emp_llm.report.page.paper_figures import save_figures

        paths += save_figures(report, png)
    return [f"{path}: {size(path.stat().st_size)}" for path in paths]
