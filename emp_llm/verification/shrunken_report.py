"""Checks the numbers in the report of a smaller model, and which tensors it may call repaired.

by themselves   against config.json and the tensors beside the report
of the source   against what the report's choices make of the source
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.checkpoint.left_behind import CONFIG_NAME
from emp_llm.errors import FormatError
from emp_llm.messages import shortened
from emp_llm.report.file_names import SHRINK_REPORT_NAME, SHRUNKEN_NOT_AS_WRITTEN
from emp_llm.report.shrink_report import ShrinkReport, StructureFields
from emp_llm.report.tensor_statistics import ratio
from emp_llm.shrink_options import ShrinkOptions
from emp_llm.shrinking.choice import WIDTHS
from emp_llm.shrinking.kinds import KINDS
from emp_llm.shrinking.plan import Shrinkage
from emp_llm.shrinking.report_on import config_changes, source_rule, structure_fields, total_sizes

__all__ = [
    "check_choices",
    "check_config_changes",
    "check_numbers_of_source",
    "check_sizes",
    "repairs",
]


def repairs(report: ShrinkReport) -> bool:
    """Whether matrices that read neurons or heads may be repaired, by the options in a report."""
    words = report["options"]
    options = dict(zip(words[::2], words[1::2], strict=False))
    narrowed = any(kind in report["structures"] for kind in WIDTHS)
    return narrowed and options.get("--repair", ShrinkOptions.repair) != "none"


def check_choices(report: ShrinkReport) -> None:
    """Check that as many structures stay in each holder as a report says, of those there are.

    Raises:
        FormatError: If not, or there is no such kind of structures.
    """
    for kind, fields in report["structures"].items():
        if kind not in KINDS:
            raise _fault(f"structures has {shortened(kind)}, which emp-llm does not know")
        _check_choice(kind, fields)


def _check_choice(kind: str, fields: StructureFields) -> None:
    for holder, part in fields["holders"].items():
        stays = part["kept"]
        if stays != sorted(set(stays)) or not all(0 <= one < fields["number"] for one in stays):
            raise _fault(
                f"structures.{kind}.holders.{holder}.kept is {shortened(stays)}, no choice of "
                f"{fields['number']}"
            )
        if not 0 < len(stays) == fields["kept"]:
            raise _fault(
                f"structures.{kind}.kept is {fields['kept']}, and of {holder} {len(stays)} stay"
            )


def check_config_changes(checkpoint: Checkpoint, report: ShrinkReport) -> None:
    """Check that config.json has the values that a report says it was given.

    Raises:
        FormatError: If it has others.
    """
    values, changes = dict(_fields(checkpoint.config)), report["config"]
    for name, change in changes.items():
        if name not in values or not change.endswith(f" → {values[name]!r}"):
            found = shortened(values[name]) if name in values else "not there"
            raise _fault(f"config.{name} is {shortened(change)}, in {CONFIG_NAME} it is {found}")
    for kind, fields in report["structures"].items():
        name, number, kept = fields["field"], fields["number"], fields["kept"]
        if type(values.get(name)) is not int or values[name] != kept:
            raise _fault(
                f"structures.{kind}.kept is {kept}, and {shortened(name)} in {CONFIG_NAME} "
                f"{shortened(values.get(name))}"
            )
        # what the source's config.json leaves to its default is told as None
        if name in changes and changes[name] not in (f"{number} → {kept}", f"None → {kept}"):
            raise _fault(f"structures.{kind}.number is {number}, and config.{name} {changes[name]}")
        if not any(f"{name}.".startswith(f"{changed}.") for changed in changes):
            raise _fault(f"structures.{kind}.field is {shortened(name)}, and config has no change")


def _fields(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, object]]:
    """All fields of a config, and of its parts, by the keys that lead to them."""
    for key, value in config.items():
        yield f"{path}{key}", value
        if isinstance(value, dict):
            yield from _fields(value, f"{path}{key}.")


def check_sizes(checkpoint: Checkpoint, report: ShrinkReport) -> None:
    """Check that a report gives the sizes of the tensors beside it.

    Raises:
        FormatError: If it does not.
    """
    entries = [entry for _, entry in checkpoint.tensors.values()]
    totals, nbytes = report["totals"], sum(entry.nbytes for entry in entries)
    expected = {
        "tensors_after": len(entries),
        "weights_after": sum(math.prod(entry.shape) for entry in entries),
        "bytes_after": nbytes,
        "bytes_ratio": ratio(nbytes, totals["bytes_before"]),
    }
    stated = {name: value for name, value in totals.items() if name in expected}
    _check_same(_named("totals", stated), _named("totals", expected), "by its tensors")


def check_numbers_of_source(report: ShrinkReport, shrinkage: Shrinkage, name: str) -> None:
    """Check all that a report says of its source but for the choices, and what was made of it.

    Args:
        report: The report.
        shrinkage: What its choices make of the source.
        name: What the user calls the source.

    Raises:
        FormatError: If the report says something else.
    """
    structures: dict[str, StructureFields] = {
        kind: structure_fields(shrinkage.plan.structures[kind], choice)
        for kind, choice in shrinkage.choices.items()
    }
    expected = {
        **dict(_of_structures(structures)),
        **_named("config", config_changes(shrinkage)),
        **_named("totals", total_sizes(shrinkage)),
        **{f"tensors.{cut.name}.source": cut.entry.name for cut in shrinkage.all_cuts},
        "left_out": sorted(shrinkage.plan.found.outside),
        "source_rule": source_rule(shrinkage.plan.checkpoint.folder),
    }
    stated = {
        **dict(_of_structures(report["structures"])),
        **_named("config", report["config"]),
        **_named("totals", report["totals"]),
        **{f"tensors.{tensor}.source": one["source"] for tensor, one in report["tensors"].items()},
        "left_out": report["left_out"],
        "source_rule": report.get("source_rule"),
    }
    _check_same(stated, expected, f"by {name}")


def _of_structures(structures: Mapping[str, StructureFields]) -> Iterator[tuple[str, object]]:
    for kind, fields in structures.items():
        yield f"structures.{kind}.field", fields["field"]
        yield f"structures.{kind}.number", fields["number"]
        yield f"structures.{kind}.kept", fields["kept"]


def _named(part: str, fields: Mapping[str, Any]) -> dict[str, object]:
    return {f"{part}.{name}": value for name, value in fields.items()}


def _check_same(stated: Mapping[str, object], expected: Mapping[str, object], by: str) -> None:
    for name in sorted(stated.keys() | expected.keys()):
        if stated.get(name) != expected.get(name):
            raise _fault(
                f"{name} is {shortened(stated.get(name))}, {by} it is "
                f"{shortened(expected.get(name))}"
            )


def _fault(what: str) -> FormatError:
    return FormatError(f"{SHRINK_REPORT_NAME}: {what}: {SHRUNKEN_NOT_AS_WRITTEN}")
