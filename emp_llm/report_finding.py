"""The report of a model that was pruned before, found and checked before it is shown."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

from emp_llm.checkpoint import read_json_object
from emp_llm.companions import REPORT_NAME
from emp_llm.errors import CheckpointError, FormatError
from emp_llm.hub import find_file
from emp_llm.options import Granularity, OutputFormat
from emp_llm.tally import HISTOGRAM_BINS

__all__ = ["find_report"]

Test = Callable[[Any], bool]


def find_report(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> dict[str, Any]:
    """Find what was done to a pruned model, without its weights.

    Args:
        model: A folder that `prune` or `unpack` wrote, or such a model of the Hugging Face Hub.
        revision: Branch, tag or commit of a model of the Hub.
        token: Token for the Hub; by default the one that is logged in.

    Returns:
        Its ``emp_report.json``.

    Raises:
        CheckpointError: If it has none; HubError if it cannot be fetched.
        FormatError: If it is not one that emp-llm wrote.
    """
    path = find_file(model, REPORT_NAME, revision=revision, token=token)
    if path is None:
        raise CheckpointError(
            f"{model}: has no {REPORT_NAME}; give a model that `emp-llm prune` wrote, or run "
            f"`emp-llm inspect` on it"
        )
    report = read_json_object(path)
    fault = next(_faults(report), None)
    if fault is not None:
        raise FormatError(f"{path}: is not a report that emp-llm wrote: {fault}; prune again")
    return report


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_figure(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _or_none(test: Test) -> Test:
    return lambda value: value is None or test(value)


def _list_of(test: Test) -> Test:
    return lambda value: isinstance(value, list) and all(map(test, value))


_SUMS: dict[str, Test] = {
    **dict.fromkeys(("tensors", "weights", "kept", "bytes_before", "bytes_after"), _is_count),
    **dict.fromkeys(("sparsity", "bytes_ratio"), _is_figure),
}
_PARTS: dict[str, dict[str, Test]] = {
    "source": {"model": _is_text, "revision": _or_none(_is_text)},
    "rule": {
        "beta": _is_figure,
        "granularity": lambda value: value in get_args(Granularity),
        "criterion": _is_text,
        "targets": _is_text,
        "ignore": _list_of(_is_text),
    },
    "totals": {},
    "tensors": {},
}
_TOTALS: dict[str, dict[str, Test]] = {
    "model": _SUMS,
    "targets": _SUMS
    | {
        "n_eff_fraction_mean": _is_figure,
        "retained_mass": _is_figure,
        "retained_mass_bound": _or_none(_is_figure),
    },
}
_TENSOR: dict[str, Test] = {
    "pruned": lambda value: isinstance(value, bool),
    "reason": _is_text,
    "kind": _is_text,
    "block": _or_none(_is_text),
    "shape": _list_of(_is_count),
    **dict.fromkeys(("weights", "kept", "bytes_before", "bytes_after"), _is_count),
}
_MEANS = ("n_eff_fraction_min", "n_eff_fraction_mean", "n_eff_fraction_max")
_PRUNED: dict[str, Test] = {
    "rows": _is_count,
    **dict.fromkeys((*_MEANS, "sparsity", "mass", "retained_mass"), _is_figure),
    "retained_mass_bound": _or_none(_is_figure),
    "n_eff_fraction_histogram": lambda value: (
        _list_of(_is_count)(value) and len(value) == HISTOGRAM_BINS
    ),
}


def _faults(report: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a report, in words; what is not shown is not looked at."""
    head: dict[str, Test] = {
        "emp_llm_version": _is_text,
        "format": lambda value: value in get_args(OutputFormat),
    }
    yield from _wrong("", report, head)
    for part, tests in _PARTS.items():
        yield from _wrong(part, report.get(part), tests)
    for part, tests in _TOTALS.items():
        yield from _wrong(f"totals.{part}", report["totals"].get(part), tests)
    tensors = report["tensors"]
    for name, fields in tensors.items():
        yield from _wrong(f"tensors.{name}", fields, _TENSOR)
        if fields["pruned"]:
            yield from _wrong(f"tensors.{name}", fields, _PRUNED)
    if not any(fields["pruned"] for fields in tensors.values()):
        yield "it prunes nothing"


def _wrong(where: str, found: object, tests: Mapping[str, Test]) -> Iterator[str]:
    if not isinstance(found, dict):
        yield f"{where} is no object"
        return
    for name, test in tests.items():
        if not test(found.get(name)):
            yield f"{f'{where}.{name}'.lstrip('.')} is {found.get(name)!r:.40}"
