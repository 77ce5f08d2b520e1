"""The page: a report's content, style and script in one HTML file, which needs no network."""

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from string import Template

from emp_llm.errors import OptionError
from emp_llm.files.atomic import check_place, write_whole
from emp_llm.report.fields import Report
from emp_llm.report.page.colours import LEAST_SPREAD, RAMP
from emp_llm.report.page.content import page_content

__all__ = ["check_page", "page_html", "write_page"]

_SCRIPTS = ("draw", "curve", "blocks", "rows", "table", "main")


def check_page(path: Path) -> None:
    """Check that a page can be written, before any work is done for it.

    Raises:
        OptionError: If the file has another suffix than ``.html`` or ``.htm``.
        OutputError: If it cannot be written.
    """
    if path.suffix.lower() not in (".html", ".htm"):
        raise OptionError(
            f"html is {str(path)!r}; give the name of an HTML file, such as report.html"
        )
    check_place(path)


def write_page(report: Report, path: Path, *, model: str | None = None) -> None:
    """Write a report as one self-contained page, in place of an older one.

    Args:
        report: What `emp_llm.inspect` returns, or a folder's ``emp_report.json``.
        path: The HTML file, which is replaced in one step.
        model: The model as the page's command names it; by default as the report does.

    Raises:
        OutputError: If it cannot be written.
    """
    write_whole(path, page_html(report, model=model).encode())


def page_html(report: Report, *, model: str | None = None) -> str:
    """The page that `write_page` writes; equal arguments give equal text."""
    content = page_content(report, model=model)
    style = _asset("page.css")
    body = "\n".join(_asset(f"{name}.js") for name in _SCRIPTS)
    opening = 'const content = JSON.parse(document.getElementById("content").textContent);'
    script = f'"use strict";\n{opening}\n{body}'
    policy = (
        f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return Template(_asset("page.html")).substitute(
        title=html.escape(f"{content['source']['model']}: Effective Model Pruning"),
        policy=policy,
        style=style,
        script=script,
        content=_inert({**content, "ramp": RAMP, "least_spread": LEAST_SPREAD}),
    )


def _asset(name: str) -> str:
    return (files("emp_llm.report.page") / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """What a content security policy allows an inline style or script by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _inert(content: Mapping[str, object]) -> str:
    """JSON in ASCII, without characters that could end its HTML element or begin another."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.translate({ord(character): f"\\u{ord(character):04x}" for character in "<>&"})
