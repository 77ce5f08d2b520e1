"""The rows of a comparison, saved as they are measured, so that the same command goes on from them.

The file holds what ``--json`` prints, of all rows that are measured, and under ``run`` what the
results depend on. It is whole at any time.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import xxhash

from emp_llm.checkpoint.json_files import JsonError, parse_json
from emp_llm.checkpoint.regular_file import open_regular
from emp_llm.errors import OptionError, OutputError
from emp_llm.files.atomic import indented, write_whole
from emp_llm.hub.source import Source
from emp_llm.output.run_description import describe_run, difference
from emp_llm.report.file_names import OF_THEIR_OWN
from emp_llm.report.source_fields import SourceFields

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


class _Row(Protocol):
    @property
    def key(self) -> tuple[object, ...]: ...


class _Comparison(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


_Cost = TypeVar("_Cost", bound=_Row)
_Whole = TypeVar("_Whole", bound=_Comparison)


class Rows(Generic[_Cost, _Whole]):
    """The rows of a comparison: those that a file has from an earlier run, and those measured now.

    A context manager, which tells an error what is kept.

    Args:
        path: The file; None to save nothing.
        run: What the results depend on, as `describe_comparison` describes it.
        read: Makes a row of what the file has of it.
        whole: Makes the comparison of all rows so far, and of how many of them were in the file.

    Raises:
        OptionError: If the file holds anything but such rows of the same run.
        OutputError: If it cannot be read.
    """

    def __init__(
        self,
        path: Path | None,
        run: Mapping[str, Any],
        *,
        read: Callable[[Mapping[str, Any]], _Cost],
        whole: Callable[[Sequence[_Cost], int], _Whole],
    ) -> None:
        self._path = path
        self._run = run
        self._whole = whole
        self._found: dict[tuple[object, ...], _Cost] = {}
        self._costs: list[_Cost] = []
        self._taken = 0
        if path is not None and path.exists():
            self._found = {cost.key: cost for cost in _read(path, run, read)}

    @property
    def comparison(self) -> _Whole:
        """All rows so far."""
        return self._whole(list(self._costs), self._taken)

    @property
    def found(self) -> int:
        """How many rows the file has from an earlier run."""
        return len(self._found)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        count = max(len(self._costs), len(self._found))
        if error is None or not count:
            return
        vars(error).pop("__notes__", None)  # of a folder for one row, which is deleted
        rows = "1 row is" if count == 1 else f"{count} rows are"
        if self._path is None:
            error.add_note(f"{rows} measured and lost: --save FILE keeps what is measured")
        else:
            error.add_note(f"{rows} kept in {self._path}: the same command goes on from there")

    def add(self, key: tuple[object, ...], measure: Callable[[], _Cost]) -> None:
        """Add a row: the one of the file, or else one that is measured now and saved.

        Raises:
            OutputError: If it cannot be saved.
        """
        cost = self._found.get(key)
        self._taken += cost is not None
        self._costs.append(measure() if cost is None else cost)
        if self._path is not None and cost is None:
            content = self.comparison.to_dict() | {"run": dict(self._run)}
            write_whole(self._path, f"{indented(content)}\n".encode())


def _read(
    path: Path, run: Mapping[str, Any], read: Callable[[Mapping[str, Any]], _Cost]
) -> list[_Cost]:
    try:
        with open_regular(path) as file:
            content: Any = parse_json(file.read())
        changed = difference(json.loads(json.dumps(run)), content["run"])
        costs = [read(fields) for fields in content["results"]]
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
