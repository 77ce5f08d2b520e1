"""The model card of a written folder: the source's own, with what was done to it on top."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["write_card"]

_FRONT_MATTER = re.compile(r"\A---\r?\n.*?\r?\n---\r?\n", re.DOTALL)
_BEGIN, _END = "<!-- emp-llm -->", "<!-- /emp-llm -->"
_OUR_SECTION = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END) + "\n*", re.DOTALL)

_PACKED_NOTE = """\
> **This checkpoint is packed.** Plain transformers refuses it with a size mismatch. Turn it into an
> ordinary one, bit for bit the pruned model, with
> `pip install emp-llm && emp-llm unpack FOLDER --out DENSE`.
"""

_DENSE_NOTE = """\
This is an ordinary checkpoint with zeros in it: everything that reads the source reads it too.
"""


def write_card(path: Path, source_card: Path, report: Mapping[str, Any] | None) -> None:
    """Write a model card.

    Args:
        path: Where to.
        source_card: The card of the model that was pruned or unpacked; its front matter and its
            text are kept, but for what an earlier `write_card` said.
        report: What was done; None if nothing is known of it.
    """
    data = source_card.read_bytes() if source_card.is_file() else b""
    text = data.decode("utf-8-sig", errors="replace")
    front = _FRONT_MATTER.match(text)
    head = front.group() if front else "---\nlibrary_name: transformers\ntags:\n- emp\n---\n"
    rest = _OUR_SECTION.sub("", text[front.end() :] if front else text).strip()
    parts = [head]
    if report is not None:
        parts.append(f"{_BEGIN}\n{_section(report)}{_END}\n")
    if rest:
        parts.append(f"{rest}\n")
    path.write_text("\n".join(parts), encoding="utf-8")


def _section(report: Mapping[str, Any]) -> str:
    rule, source, totals = report["rule"], report["source"], report["totals"]
    revision = f" at `{source['revision']}`" if source["revision"] else ""
    rows = [
        f"| {label} | {part['weights']:,} | {part['sparsity']:.2%} | {part['bytes_before']:,} | "
        f"{part['bytes_after']:,} | {part['bytes_ratio']:.3f} |"
        for label, part in (("targets", totals["targets"]), ("whole model", totals["model"]))
    ]
    return "\n".join(
        [
            f"# {source['model']}, pruned by Effective Model Pruning",
            "",
            _PACKED_NOTE if report["format"] == "packed" else _DENSE_NOTE,
            f"Made from `{source['model']}`{revision} by emp-llm {report['emp_llm_version']}: "
            f"β = {rule['beta']:g}, granularity `{rule['granularity']}`, criterion "
            f"`{rule['criterion']}`, targets `{rule['targets']}`. The rule is "
            "[arXiv 2509.25606](https://arxiv.org/abs/2509.25606); `emp_report.json` tells of "
            "every tensor.",
            "",
            "| | weights | sparsity | bytes before | bytes after | ratio |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )
