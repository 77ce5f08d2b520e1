"""The figures of an evaluation: the file `emp_eval.json` beside the weights it was made on.

    {"results": [{"task": {"type": "text-generation", "name": "Text generation"},
                  "dataset": {"type": "Salesforce/wikitext", "name": "WikiText-2"},
                  "metric": {"type": "perplexity", "name": "perplexity"},
                  "value": 5.61, "dense_value": 5.47, "stderr": null}]}

The types are the Hub's identifiers, the names are for people. `value` is the pruned model's figure,
`dense_value` that of the model it was made from, `stderr` the standard error of `value`; the last
two may be null. The file speaks of the weights beside it: it is not taken along to another folder.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emp_llm.checkpoint.json_files import read_json_object
from emp_llm.errors import FormatError
from emp_llm.report.file_names import EVAL_NAME

__all__ = ["Subject", "TaskResult", "read_results"]


@dataclass(frozen=True)
class Subject:
    """A task, a dataset or a metric.

    Attributes:
        type: The Hub's identifier of it.
        name: What people call it.
    """

    type: str
    name: str


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One figure of the pruned model, and the dense one's where it is known."""

    task: Subject
    dataset: Subject
    metric: Subject
    value: float
    dense_value: float | None
    stderr: float | None


def read_results(folder: Path) -> tuple[TaskResult, ...]:
    """Read the figures in a folder; none where it has no such file.

    Raises:
        CheckpointError: If the file cannot be read or is not a JSON object.
        FormatError: If it does not hold what it must.
    """
    path = folder / EVAL_NAME
    if not path.is_file():
        return ()
    results = read_json_object(path).get("results")
    if not isinstance(results, list):
        raise _fault(path, "results", results, "a list")
    return tuple(_result(path, f"results[{i}]", result) for i, result in enumerate(results))


def _result(path: Path, where: str, result: object) -> TaskResult:
    if not isinstance(result, dict):
        raise _fault(path, where, result, "an object")
    subjects = {name: _subject(path, where, result, name) for name in ("task", "dataset", "metric")}
    for name in ("value", "dense_value", "stderr"):
        figure = result.get(name)
        if not (_is_finite(figure) or (figure is None and name != "value")):
            raise _fault(path, f"{where}.{name}", figure, "a finite number")
    return TaskResult(
        **subjects,
        value=result["value"],
        dense_value=result.get("dense_value"),
        stderr=result.get("stderr"),
    )


def _is_finite(figure: object) -> bool:
    if isinstance(figure, bool) or not isinstance(figure, int | float):
        return False
    return math.isfinite(figure)


def _subject(path: Path, where: str, result: Mapping[str, Any], name: str) -> Subject:
    subject = result.get(name)
    parts = [subject.get(part) if isinstance(subject, dict) else None for part in ("type", "name")]
    if not all(isinstance(part, str) and part.strip() for part in parts):
        raise _fault(path, f"{where}.{name}", subject, 'an object with strings "type" and "name"')
    return Subject(*(" ".join(str(part).split()) for part in parts))


def _fault(path: Path, where: str, found: object, expected: str) -> FormatError:
    return FormatError(
        f"{path}: {where} is {found!r:.80}, it must be {expected}: "
        "evaluate again or delete the file"
    )
