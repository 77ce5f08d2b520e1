"""The rows of a comparison, saved as they are measured, so that the same command goes on from them.

The file holds what ``--json`` prints, of all rows that are measured, and under ``run`` what the
results depend on. It is whole at any time.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import xxhash

from emp_llm.checkpoint.json_files import JsonError, parse_json
from emp_llm.checkpoint.regular_file import open_regular
from emp_llm.comparison.costs import Comparison, Cost, Method
from emp_llm.errors import OptionError, OutputError
from emp_llm.evaluation.perplexity import Perplexity
from emp_llm.files.atomic import indented, write_whole
from emp_llm.hub.source import Source
from emp_llm.output.run_description import describe_run, difference
from emp_llm.report.fields import SourceFields
from emp_llm.report.file_names import OF_THEIR_OWN

__all__ = ["Rows", "content_of", "describe_comparison"]


def content_of(text: str) -> str:
    """What stands for a text where runs are compared: its checksum."""
    return xxhash.xxh3_128_hexdigest(text.encode(errors="surrogatepass"))


def describe_comparison(
    source: Source, name: SourceFields, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Describe all that the results of a comparison depend on.

    Args:
        source: The model.
        name: Its name and revision.
        options: What was asked for, as JSON can hold it.

    Returns:
        As `emp_llm.output.run_description.describe_run`; what people may rewrite beside the weights
        is left out.
    """
    described = describe_run(source.open_checkpoint(), options, name)
    files = {file: of for file, of in described["files"].items() if file not in OF_THEIR_OWN}
    return described | {"files": files}


class Rows:
    """The rows of a comparison: those that a file has from an earlier run, and those measured now.

    A context manager, which tells an error what is kept.

    Args:
        path: The file; None to save nothing.
        run: What the results depend on, as `describe_comparison` describes it.
        source: As for `Comparison`.
        settings: As for `Comparison`.

    Attributes:
        comparison: All rows so far.

    Raises:
        OptionError: If the file holds anything but such rows of the same run.
        OutputError: If it cannot be read.
    """

    def __init__(
        self,
        path: Path | None,
        run: Mapping[str, Any],
        *,
        source: SourceFields,
        settings: Mapping[str, Any],
    ) -> None:
        self._path = path
        self._run = run
        self._found: dict[tuple[str, float | None], Cost] = {}
        self.comparison = Comparison(source=source, settings=settings, costs=[])
        if path is not None and path.exists():
            self._found = {(cost.method, cost.beta): cost for cost in _read(path, run)}

    @property
    def found(self) -> int:
        """How many rows the file has from an earlier run."""
        return len(self._found)

    def __enter__(self) -> "Rows":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        count = max(len(self.comparison.costs), len(self._found))
        if error is None or not count:
            return
        vars(error).pop("__notes__", None)  # of a folder for one row, which is deleted
        rows = "1 row is" if count == 1 else f"{count} rows are"
        if self._path is None:
            error.add_note(f"{rows} measured and lost: --save FILE keeps what is measured")
        else:
            error.add_note(f"{rows} kept in {self._path}: the same command goes on from there")

    def add(self, method: Method, beta: float | None, measure: Callable[[], Cost]) -> None:
        """Add a row: the one of the file, or else one that is measured now and saved.

        Raises:
            OutputError: If it cannot be saved.
        """
        cost = self._found.get((method, beta))
        costs = [*self.comparison.costs, measure() if cost is None else cost]
        taken = self.comparison.taken + (cost is not None)
        self.comparison = replace(self.comparison, costs=costs, taken=taken)
        if self._path is not None and cost is None:
            content = self.comparison.to_dict() | {"run": dict(self._run)}
            write_whole(self._path, f"{indented(content)}\n".encode())


def _read(path: Path, run: Mapping[str, Any]) -> list[Cost]:
    try:
        with open_regular(path) as file:
            content: Any = parse_json(file.read())
        changed = difference(json.loads(json.dumps(run)), content["run"])
        costs = [_cost(fields) for fields in content["results"]]
    except OSError as error:
        raise OutputError(f"{path}: cannot be read: {error.strerror}; give another file") from error
    except (JsonError, KeyError, TypeError, AttributeError) as error:
        raise OptionError(
            f"{path}: is not a file that compare has saved: give the name of a new one"
        ) from error
    if changed:
        raise OptionError(
            f"{path}: holds the results of a comparison that differs from this one ({changed}): "
            "repeat the command that began it, or give another file"
        )
    return costs


def _cost(fields: Mapping[str, Any]) -> Cost:
    names = ("method", "beta", "weights", "kept")
    runs = tuple(Perplexity(**run) for run in fields["runs"])
    return Cost(runs=runs, **{name: fields[name] for name in names})
