"""The report of a smaller model, ``emp_shrink.json``: its type, and how it is read and written.

It lies beside a model that is an ordinary one otherwise, and stays with it when that is pruned. As
in `emp_llm.report.fields`, the types here are also what a report is checked by when it is read.
"""

import ast
import math
from contextlib import suppress
from pathlib import Path
from typing import NotRequired, TypedDict, cast

from emp_llm.checkpoint.json_files import read_json_object
from emp_llm.checkpoint.left_behind import LeftBehind
from emp_llm.errors import FormatError
from emp_llm.report.fields import FileCount, FileFields, OtherTensor
from emp_llm.report.file import write_with_tensors
from emp_llm.report.file_names import SHRINK_REPORT_NAME
from emp_llm.report.schema import fault_in_files, fault_in_form
from emp_llm.report.source_fields import SourceFields
from emp_llm.rule_fields import RuleFields, SampleFields

__all__ = [
    "HolderFields",
    "ShrinkReport",
    "ShrinkTotals",
    "ShrunkenTensor",
    "StructureFields",
    "Tried",
    "as_other_tensor",
    "config_change",
    "read_shrink_report",
    "short_change",
    "write_shrink_report",
]


_ARROW = " → "
_SHORT, _LONG = 24, 100
"""Characters of a list, and of any other value, that is shown whole."""


class Tried(TypedDict):
    """A number of structures that was tried, to find which stay or how many.

    Attributes:
        number: How many stayed; None for all of them.
        loss: The loss on the calibration data, nats per token.
        perplexity: Its exponential.
        gone: The one that went last, where they go one by one.
    """

    number: int | None
    loss: float
    perplexity: float
    gone: NotRequired[int]


class HolderFields(TypedDict):
    """The structures of one decoder block, or the decoder blocks of the model.

    Attributes:
        kept: The numbers of those that stay, ascending.
        scores: The score of each, to six digits, also of those that went.
        n_eff: The effective number (Σs)² / Σs² of the scores, unless one is negative.
    """

    kept: list[int]
    scores: NotRequired[list[float]]
    n_eff: NotRequired[float]


class StructureFields(TypedDict):
    """The structures of one kind.

    Attributes:
        field: The field of config.json that gives their number.
        number: How many there were in each holder.
        kept: How many stay in each.
        score: What they were ranked by.
        holders: Each, by its name in the source.
        tried: What was tried to find them, in order.
    """

    field: str
    number: int
    kept: int
    score: str
    holders: dict[str, HolderFields]
    tried: NotRequired[list[Tried]]


class ShrinkTotals(TypedDict):
    """The tensors together.

    Attributes:
        tensors_before: How many the source has.
        tensors_after: How many there are.
        weights_before: Weights of the source.
        weights_after: Weights that are left.
        bytes_before: Bytes of the source's tensors.
        bytes_after: Bytes of those that are left.
        bytes_ratio: `bytes_after` over `bytes_before`, to six digits.
    """

    tensors_before: int
    tensors_after: int
    weights_before: int
    weights_after: int
    bytes_before: int
    bytes_after: int
    bytes_ratio: float


class ShrunkenTensor(TypedDict):
    """One tensor.

    Attributes:
        source: Its name in the source.
        dtype: As safetensors names it.
        shape: Its shape.
        bytes: Bytes of its data.
        hash: Checksum of these, with the name of the algorithm.
        repaired: True where it has other weights than those that the source has there.
    """

    source: str
    dtype: str
    shape: list[int]
    bytes: int
    hash: str
    repaired: NotRequired[bool]


class ShrinkReport(TypedDict):
    """What `emp_llm.shrink` did to a checkpoint.

    Attributes:
        emp_llm_version: The release that did it.
        source: The model that it was made from.
        source_rule: The rule that this was pruned by before, or what it was shrunken from in turn;
            only if one was. Its own report is not copied: that describes other tensors.
        options: What was asked for, as words of the command line.
        structures: What became fewer, by kind.
        calibration: The samples that this was found on, if on any.
        config: The fields of config.json that are other ones than the source's, each as
            "before → after", whole.
        totals: All tensors together.
        tensors: Each tensor, by its name.
        left_out: Tensors of the source that its model has no place for, which are not copied.
        carried: The files that were copied from the source.
        left_behind: Those that were not, and why.
        files: All files but the model card and those of emp-llm.
    """

    emp_llm_version: str
    source: SourceFields
    source_rule: NotRequired[RuleFields]
    options: list[str]
    structures: dict[str, StructureFields]
    calibration: NotRequired[SampleFields]
    config: dict[str, str]
    totals: ShrinkTotals
    tensors: dict[str, ShrunkenTensor]
    left_out: list[str]
    carried: FileCount
    left_behind: list[LeftBehind]
    files: dict[str, FileFields]


def as_other_tensor(fields: ShrunkenTensor) -> OtherTensor:
    """A tensor of a smaller model as a report of a pruning describes one that was not pruned."""
    weights = math.prod(fields["shape"])
    return {
        "pruned": False,
        "reason": "",
        "kind": "",
        "block": None,
        "dtype": fields["dtype"],
        "shape": fields["shape"],
        "weights": weights,
        "kept": weights,
        "bytes_before": fields["bytes"],
        "bytes_after": fields["bytes"],
        "hash": fields["hash"],
        "repaired": fields.get("repaired", False),
    }


def config_change(before: object, after: object) -> str:
    """A change of a field, as `ShrinkReport.config` has it.

    >>> config_change(None, [6, 4])
    'None → [6, 4]'
    """
    return f"{before!r}{_ARROW}{after!r}"


def short_change(change: str) -> str:
    """A change of a field for people: of a long list only how many items it has.

    >>> short_change(config_change(["full_attention"] * 30, ["full_attention"] * 28))
    '30 items → 28 items'
    >>> short_change("30 → 28")
    '30 → 28'
    """
    return _ARROW.join(map(_short, change.split(_ARROW)))


def _short(value: str) -> str:
    if len(value) <= _SHORT:
        return value
    with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        found = ast.literal_eval(value)
        if isinstance(found, list):
            return f"{len(found)} items"
    return value if len(value) <= _LONG else f"{value[:_LONG]} …"


def read_shrink_report(folder: Path) -> ShrinkReport | None:
    """The report of a smaller model in a folder; None if it has none.

    Raises:
        CheckpointError: If it cannot be read or is not JSON.
        FormatError: If it is not one that emp-llm wrote.
    """
    path = folder / SHRINK_REPORT_NAME
    if not path.is_file():
        return None
    content = read_json_object(path, strict=True)
    fault = fault_in_form(ShrinkReport, content)
    report = cast("ShrinkReport", content)
    if fault is None:
        fault = fault_in_files(report["files"])
    if fault is not None:
        raise FormatError(
            f"{path}: is not a report that emp-llm wrote: {fault}; shrink the source again"
        )
    return report


def write_shrink_report(folder: Path, report: ShrinkReport) -> None:
    """Write the report of a smaller model into its folder."""
    write_with_tensors(folder / SHRINK_REPORT_NAME, report)
