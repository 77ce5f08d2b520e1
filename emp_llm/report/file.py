"""Writes the report of a folder, and reads it with every check of its form."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emp_llm.files.atomic import indented, write_json
from emp_llm.report.fields import Report
from emp_llm.report.file_names import REPORT_NAME
from emp_llm.report.schema import read_report_file

__all__ = ["read_report", "write_report", "write_with_tensors"]


def read_report(folder: Path) -> Report | None:
    """The report of a folder; None if it has none.

    Raises:
        CheckpointError: If it cannot be read or is not JSON.
        FormatError: If it is not one that emp-llm wrote.
    """
    path = folder / REPORT_NAME
    return read_report_file(path) if path.is_file() else None


_MOST_INDENTED = 10_000


def write_report(folder: Path, report: Report) -> None:
    """Write a report into a folder."""
    write_with_tensors(folder / REPORT_NAME, report)


def write_with_tensors(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report, indented; of more than 10,000 of its ``tensors`` each has one line.

    Indented, the report of 70,000 tensors would come near `MAX_JSON_BYTES`, which is all that is
    read of a JSON file.
    """
    if len(report["tensors"]) <= _MOST_INDENTED:
        write_json(path, report)
        return
    lines = (
        f"    {json.dumps(name, ensure_ascii=False)}: {json.dumps(fields, ensure_ascii=False)}"
        for name, fields in report["tensors"].items()
    )
    before, after = indented({**report, "tensors": None}).split('\n  "tensors": null', 1)
    tensors = ",\n".join(lines)
    text = f'{before}\n  "tensors": {{\n{tensors}\n  }}{after}\n'
    path.write_text(text, encoding="utf-8")
