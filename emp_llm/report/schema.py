"""The form of a report: every part of it that is used is there, and of the type it must be.

A report is read from folders that others wrote: names in it lead to no file elsewhere, and numbers
are such as can be reckoned with.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from emp_llm.checkpoint.json_files import read_json_object
from emp_llm.errors import FormatError
from emp_llm.messages import shortened
from emp_llm.options import CountBy, Granularity, OutputFormat, Repair
from emp_llm.report.tensor_statistics import HISTOGRAM_BINS, trimmed

__all__ = ["read_report_file"]

Test = Callable[[Any], bool]

_HISTOGRAM = "n_eff_fraction_histogram"
_START = f"{_HISTOGRAM}_start"

_MOST = 2**63 - 1
_MOST_DIMENSIONS = 64
_LONGEST_NAME = 255  # bytes, of a file on Linux
_LONGEST_BLOCK = 1000  # characters; the number in it is read
_MOST_FIGURE = 1e60  # more than all weights of float32 add up to


def read_report_file(path: Path) -> dict[str, Any]:
    """Read an ``emp_report.json``.

    Raises:
        CheckpointError: If it cannot be read or is not JSON.
        FormatError: If it is not one that emp-llm wrote.
    """
    report = read_json_object(path, strict=True)
    fault = next(_faults(report), None)
    if fault is not None:
        raise FormatError(f"{path}: is not a report that emp-llm wrote: {fault}; prune again")
    for fields in report["tensors"].values():
        if fields["pruned"] and _START not in fields:  # as earlier releases wrote it
            fields |= trimmed(fields[_HISTOGRAM])
    return report


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_flag(value: object) -> bool:
    return isinstance(value, bool)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MOST


def _is_positive(value: object) -> bool:
    return _is_count(value) and value != 0


def _is_figure(value: object) -> bool:
    return _is_count(value) or (type(value) is float and abs(value) <= _MOST_FIGURE)


def _is_block(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _LONGEST_BLOCK


def _is_absent(value: object) -> bool:
    return value is None


def _or_none(test: Test) -> Test:
    return lambda value: value is None or test(value)


def _list_of(test: Test) -> Test:
    return lambda value: isinstance(value, list) and all(map(test, value))


def _is_shape(value: object) -> bool:
    return isinstance(value, list) and len(value) <= _MOST_DIMENSIONS and all(map(_is_count, value))


def _is_matrix(value: object) -> bool:
    return _is_shape(value) and len(value) >= 2 and 0 not in value  # type: ignore[arg-type, operator]


def _is_histogram(value: object) -> bool:
    return _list_of(_is_count)(value) and len(value) <= HISTOGRAM_BINS  # type: ignore[arg-type]


def _fits(fields: Mapping[str, Any]) -> bool:
    """Whether a histogram, which has all bins where no start is told, ends where bins do."""
    bins = len(fields[_HISTOGRAM])
    return bins == HISTOGRAM_BINS if _START not in fields else _is_within(fields[_START], bins)


def _is_within(start: object, bins: int) -> bool:
    return _is_count(start) and start + bins <= HISTOGRAM_BINS  # type: ignore[operator]


def _is_object_of(tests: Mapping[str, Test]) -> Test:
    return lambda value: isinstance(value, dict) and all(t(value.get(n)) for n, t in tests.items())


_TRIED: dict[str, Test] = {
    "beta": _or_none(_is_figure),
    "loss": _is_figure,
    "perplexity": _is_figure,
}
_DATA: dict[str, Test] = {
    "text": _or_none(_is_text),
    "seed": _is_count,
    **dict.fromkeys(("samples", "length"), _or_none(_is_count)),
    "sequential": _or_none(_is_flag),
    "hash": _or_none(_is_text),
}
_FRACTIONS = ("n_eff_fraction_min", "n_eff_fraction_mean", "n_eff_fraction_max")
_SUMS: dict[str, Test] = {
    **dict.fromkeys(("tensors", "weights", "kept", "bytes_before", "bytes_after"), _is_count),
    **dict.fromkeys(("sparsity", "bytes_ratio"), _is_figure),
}
_HEAD: dict[str, Test] = {
    "emp_llm_version": _is_text,
    "format": lambda value: value in get_args(OutputFormat),
    # only `inspect` finds these, which writes no file
    **dict.fromkeys(("curve", "standing_out"), _is_absent),
    **dict.fromkeys(("target_sparsity", "max_loss_increase"), _or_none(_is_figure)),
    "search_data": _or_none(_is_object_of(_DATA)),
    "search": _or_none(_list_of(_is_object_of(_TRIED))),
    "calibration": _or_none(_is_object_of({"without_tokens": _or_none(_list_of(_is_text))})),
}
_PARTS: dict[str, dict[str, Test]] = {
    "source": {"model": _is_text, "revision": _or_none(_is_text)},
    "rule": {
        "beta": _is_figure,
        "granularity": lambda value: value in get_args(Granularity),
        "criterion": _is_text,
        "targets": _is_text,
        "ignore": _list_of(_is_text),
        "count_by": lambda value: value is None or value in get_args(CountBy),
        "repair": lambda value: value is None or value in get_args(Repair),
        "calibration": _or_none(_is_object_of(_DATA)),
    },
    "totals": {"files": _is_absent},
    "tensors": {},
    "files": {},
}
_TOTALS: dict[str, dict[str, Test]] = {
    "model": _SUMS,
    "targets": _SUMS
    | {
        **dict.fromkeys((*_FRACTIONS, "retained_mass"), _is_figure),
        "retained_mass_bound": _or_none(_is_figure),
    },
}
_TENSOR: dict[str, Test] = {
    "pruned": _is_flag,
    **dict.fromkeys(("reason", "kind", "dtype", "hash"), _is_text),
    "block": _or_none(_is_block),
    "repaired": _or_none(_is_flag),
    "shape": _is_shape,
    **dict.fromkeys(("weights", "kept", "bytes_before", "bytes_after"), _is_count),
}
_N_EFF = ("n_eff_min", "n_eff_mean", "n_eff_max")
_PRUNED: dict[str, Test] = {
    "shape": _is_matrix,
    "transposed": _is_flag,
    **dict.fromkeys(("rows", "weights"), _is_positive),
    **dict.fromkeys((*_N_EFF, *_FRACTIONS, "sparsity", "mass", "retained_mass"), _is_figure),
    "retained_mass_bound": _or_none(_is_figure),
    _HISTOGRAM: _is_histogram,
}


def _faults(report: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a report, in words; what is not used is not looked at."""
    yield from _wrong("", report, _HEAD)
    for part, tests in _PARTS.items():
        yield from _wrong(part, report.get(part), tests)
    for part, tests in _TOTALS.items():
        yield from _wrong(f"totals.{part}", report["totals"].get(part), tests)
    for name, fields in report["tensors"].items():
        yield from _wrong(f"tensors.{name}", fields, _TENSOR)
        if fields["pruned"]:
            yield from _wrong(f"tensors.{name}", fields, _PRUNED)
            if not _fits(fields):
                yield f"tensors.{name}.{_HISTOGRAM} is {shortened(fields[_HISTOGRAM])}"
    for name, fields in report["files"].items():
        if not _is_beside(name):
            yield f"{shortened(name)} is no file beside it"
        checksum = "header_hash" if "header_hash" in (fields or ()) else "hash"
        yield from _wrong(f"files.{name}", fields, {"bytes": _is_count, checksum: _is_text})


def _is_beside(name: str) -> bool:
    """Whether a name is a path that stays in the folder."""
    parts = PurePosixPath(name).parts
    fits = all(len(os.fsencode(part)) <= _LONGEST_NAME for part in parts)
    return bool(parts) and fits and not {"/", ".."}.intersection(parts) and "\0" not in name


def _wrong(where: str, found: object, tests: Mapping[str, Test]) -> Iterator[str]:
    if not isinstance(found, dict):
        yield f"{where} is no object"
        return
    for name, test in tests.items():
        if not test(found.get(name)):
            yield f"{f'{where}.{name}'.lstrip('.')} is {shortened(found.get(name))}"
