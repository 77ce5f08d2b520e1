"""The results of an evaluation: the file `emp_eval.json` beside the weights it was made on.

    {"results": [{"task": {"type": "text-generation", "name": "Text generation"},
                  "dataset": {"type": "Salesforce/wikitext", "name": "WikiText-2"},
                  "metric": {"type": "perplexity", "name": "perplexity"},
                  "value": 5.61, "dense_value": 5.47, "stderr": null}]}

The types are the Hub's identifiers, the names are for people. `value` is the pruned model's score,
`dense_value` that of the model it was made from, `stderr` the standard error of `value`; the last
two may be null. The file is about the weights beside it, so `unpack` does not copy it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from emp_llm.checkpoint.json_files import read_json_object
from emp_llm.errors import FormatError
from emp_llm.report.file_names import EVAL_NAME

__all__ = ["Subject", "TaskResult", "read_results"]


@dataclass(frozen=True)
class Subject:
    """A task, a dataset or a metric.

    Attributes:
        type: Its identifier on the Hub.
        name: Its name for people.
    """

    type: str
    name: str


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One score of a pruned model.

    Attributes:
        task: The task.
        dataset: What it was measured on.
        metric: What was measured.
        value: The score.
        dense_value: The score of the model that was pruned; None if it is not known.
        stderr: The standard error of `value`; None if it is not known.
    """

    task: Subject
    dataset: Subject
    metric: Subject
    value: float
    dense_value: float | None
    stderr: float | None


def read_results(folder: Path) -> tuple[TaskResult, ...]:
    """Read the results in a folder; none where it has no such file.

    Raises:
        CheckpointError: If the file cannot be read or is not a JSON object.
        FormatError: If it is not of the form above.
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
    return TaskResult(
        task=_subject(path, where, result, "task"),
        dataset=_subject(path, where, result, "dataset"),
        metric=_subject(path, where, result, "metric"),
        value=_number(path, f"{where}.value", result.get("value")),
        dense_value=_number_or_none(path, f"{where}.dense_value", result.get("dense_value")),
        stderr=_number_or_none(path, f"{where}.stderr", result.get("stderr")),
    )


def _number_or_none(path: Path, where: str, value: object) -> float | None:
    return None if value is None else _number(path, where, value)


def _number(path: Path, where: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _fault(path, where, value, "a finite number")
    return value


def _subject(path: Path, where: str, result: Mapping[str, object], name: str) -> Subject:
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
