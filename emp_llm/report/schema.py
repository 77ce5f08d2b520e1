"""The form of a report that was read: every field is of the type that `Report` gives it.

A report may come from an untrusted folder: names in it must not lead to files elsewhere, and
numbers must be small enough to compute with. The check is derived from the types in
`emp_llm.report.fields`.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path, PurePosixPath
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from emp_llm.checkpoint.json_files import read_json_object
from emp_llm.errors import FormatError
from emp_llm.messages import shortened
from emp_llm.report.fields import (
    HISTOGRAM_BINS,
    IN_FILES,
    NOT_IN_FILES,
    FileFields,
    PrunedTensor,
    Report,
)
from emp_llm.report.tensor_statistics import trimmed

__all__ = ["fault_in_files", "fault_in_form", "read_report_file"]

Check = Callable[[Any], str | None]
"""Says what is wrong with a value, to follow its name: " is not an object", ".seed is 'x'"."""

_LARGEST_COUNT = 2**63 - 1
_LARGEST_NUMBER = 1e60  # more than all weights of float32 add up to
_LONGEST_NAME = 255  # bytes, of a file on Linux
_TAG = "pruned"  # the field that tells the members of a union apart


def read_report_file(path: Path) -> Report:
    """Read an ``emp_report.json``.

    Raises:
        CheckpointError: If it cannot be read or is not JSON.
        FormatError: If it is not one that emp-llm wrote.
    """
    content = read_json_object(path, strict=True)
    fault = fault_in_form(Report, content)
    report = cast("Report", content)
    fault = fault if fault is not None else next(_faults(report), None)
    if fault is not None:
        raise FormatError(
            f"{path}: is not a report that emp-llm wrote: {fault}; prune or pack again"
        )
    for fields in report["tensors"].values():
        if fields["pruned"] and "n_eff_fraction_histogram_start" not in fields:
            start, counts = trimmed(fields["n_eff_fraction_histogram"])
            fields["n_eff_fraction_histogram_start"] = start
            fields["n_eff_fraction_histogram"] = counts
    return report


def _faults(report: Report) -> Iterator[str]:
    """What is wrong with a report whose fields are of the right types."""
    for name, fields in report["tensors"].items():
        if fields["pruned"] and not _has_all_bins(fields):
            counts = fields["n_eff_fraction_histogram"]
            yield f"tensors.{name}.n_eff_fraction_histogram is {shortened(counts)}"
    if fault := fault_in_files(report["files"]):
        yield fault


def fault_in_form(kind: type, content: object) -> str | None:
    """What is wrong with an object that was read, by the type of a report; None if nothing is."""
    fault = _check_of(kind)(content)
    return None if fault is None else fault.removeprefix(".")


def fault_in_files(files: Mapping[str, FileFields]) -> str | None:
    """What is wrong with a report's part on files, whose fields are of the right types."""
    for name, file in files.items():
        if not _is_beside(name):
            return f"{shortened(name)} is not a file beside it"
        if file.get("header_hash", file.get("hash")) is None:
            return f"files.{name}.hash is None"
    return None


def _has_all_bins(fields: PrunedTensor) -> bool:
    """Whether a histogram, which is whole where it has no start, ends where bins do."""
    bins = len(fields["n_eff_fraction_histogram"])
    if "n_eff_fraction_histogram_start" not in fields:
        return bins == HISTOGRAM_BINS
    start = fields["n_eff_fraction_histogram_start"]
    return _is_count(start) and start + bins <= HISTOGRAM_BINS


def _is_beside(name: str) -> bool:
    """Whether a name is a path that stays in the folder."""
    parts = PurePosixPath(name).parts
    fits = all(len(os.fsencode(part)) <= _LONGEST_NAME for part in parts)
    return bool(parts) and fits and not {"/", ".."}.intersection(parts) and "\0" not in name


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST_COUNT


def _is_number(value: object) -> bool:
    return _is_count(value) or (type(value) is float and abs(value) <= _LARGEST_NUMBER)


_TESTS: dict[object, Callable[[object], bool]] = {
    int: _is_count,
    float: _is_number,
    bool: lambda value: isinstance(value, bool),
    str: lambda value: isinstance(value, str),
}


@cache  # each type is taken apart once
def _check_of(kind: object) -> Check:
    """The check that a type stands for."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind in _TESTS:
        return _is(_TESTS[kind])
    if is_typeddict(kind):
        return _is_object(cast("type", kind))
    if origin is Literal:
        return _is(lambda value: isinstance(value, str | bool) and value in parts)
    if origin is Annotated:
        return _is_narrower(_check_of(parts[0]), [test for test in parts[1:] if callable(test)])
    if origin in (Union, UnionType):  # whichever of the two this Python makes of A | B
        return _is_one_of([part for part in parts if part is not NoneType], NoneType in parts)
    if origin is list:
        return _is_list(_check_of(parts[0]))
    if origin is dict:
        return _is_mapping(_check_of(parts[1]))
    raise TypeError(f"no check of {kind}")


def _is(test: Callable[[object], bool]) -> Check:
    return lambda value: None if test(value) else f" is {shortened(value)}"


def _is_narrower(check: Check, tests: Sequence[Callable[[Any], bool]]) -> Check:
    narrower = _is(lambda value: all(test(value) for test in tests))
    return lambda value: check(value) or narrower(value)


def _is_list(check: Check) -> Check:
    return _is(lambda value: isinstance(value, list) and not any(map(check, value)))


def _is_mapping(check: Check) -> Check:
    def fault(value: object) -> str | None:
        if not isinstance(value, dict):
            return " is not an object"
        faults = ((name, check(field)) for name, field in value.items())
        return next((f".{name}{found}" for name, found in faults if found), None)

    return fault


def _is_one_of(kinds: Sequence[object], or_none: bool) -> Check:
    """A value of one type, or an object whose field `pruned` says which type it is of."""
    if len(kinds) == 1:
        check = _check_of(kinds[0])
        return lambda value: None if value is None and or_none else check(value)
    checks = {get_args(get_type_hints(kind)[_TAG])[0]: _check_of(kind) for kind in kinds}

    def fault(value: object) -> str | None:
        tag = value.get(_TAG) if isinstance(value, dict) else True
        if not isinstance(tag, bool):
            return f".{_TAG} is {shortened(tag)}"
        return checks[tag](value)

    return fault


def _is_object(kind: type) -> Check:
    hints = get_type_hints(kind, include_extras=True)
    optional = {name for name, hint in hints.items() if get_origin(hint) is NotRequired}
    checks = {name: _check_of(hint) for name, hint in hints.items() if name not in optional}
    checks |= {name: _check_of_optional(hints[name]) for name in sorted(optional)}

    def fault(value: object) -> str | None:
        if not isinstance(value, dict):
            return " is not an object"
        for name, check in checks.items():
            found = check(value.get(name))
            if found is not None:
                return f".{name}{found}"
            if name not in value and name not in optional:
                return f".{name} is missing"
        return None

    return fault


def _check_of_optional(hint: object) -> Check:
    """The check of a field that may be missing, for which null stands as well."""
    (kind,) = get_args(hint)
    marks = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
    if NOT_IN_FILES in marks:
        return _is(lambda value: value is None)
    check = _check_of(kind)
    return check if IN_FILES in marks else lambda value: None if value is None else check(value)
