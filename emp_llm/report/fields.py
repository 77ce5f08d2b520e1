"""The report as a type: every field of ``emp_report.json``, and of what `emp_llm.inspect` returns.

This is the one description of a report: mypy checks by it what is built and shown, and
`emp_llm.report.schema` what is read. There an int is a count from 0 to 2⁶³ − 1, a float any number
up to 1e60 in magnitude, and what `Annotated` adds is a further test of the value. At run time a
report is a plain dict, as JSON holds it.
"""

from collections.abc import Callable, Sized
from typing import Annotated, Final, Literal, NotRequired, TypedDict

from emp_llm.checkpoint.left_behind import LeftBehind
from emp_llm.options import OutputFormat
from emp_llm.report.source_fields import BaseFields, SourceFields, TensorCount
from emp_llm.rule_fields import DataFields, RuleFields

__all__ = [
    "HISTOGRAM_BINS",
    "IN_FILES",
    "NOT_IN_FILES",
    "Curve",
    "CurveTotals",
    "ExtraFields",
    "FileCount",
    "FileFields",
    "FileTotals",
    "GroupTotals",
    "MassTotals",
    "NoteFields",
    "OtherTensor",
    "OutlierRow",
    "PrunedTensor",
    "Report",
    "ReportTotals",
    "StatisticFields",
    "Sums",
    "TargetTotals",
    "TensorFields",
    "Trial",
]

HISTOGRAM_BINS = 50
"""Bin i counts the groups with N_eff / N in [i / 50, (i + 1) / 50), the last one 1 as well."""

IN_FILES: Final = "in every emp_report.json"
"""Marks a field that `inspect` leaves out, and that a report on disk must have."""

NOT_IN_FILES: Final = "in no emp_report.json"
"""Marks a field that only `inspect` fills, which writes no file."""


def _at_most(length: int) -> Callable[[Sized], bool]:
    return lambda value: len(value) <= length


def _is_positive(value: int) -> bool:
    return value > 0


def _is_above_zero(value: float) -> bool:
    return value > 0


def _is_matrix(shape: list[int]) -> bool:
    return len(shape) >= 2 and 0 not in shape


_Shape = Annotated[list[int], _at_most(64)]
_MatrixShape = Annotated[list[int], _at_most(64), _is_matrix]
_Positive = Annotated[int, _is_positive]
_Beta = Annotated[float, _is_above_zero]
_BlockName = Annotated[str, _at_most(1000)]  # the number in it is read
_Histogram = Annotated[list[int], _at_most(HISTOGRAM_BINS)]


class FileFields(TypedDict):
    """One file of a folder.

    Attributes:
        bytes: Its size.
        hash: Checksum of all of it, with the name of the algorithm.
        header_hash: In the place of `hash`, of safetensors: that of what comes before the data.
    """

    bytes: int
    hash: NotRequired[str]
    header_hash: NotRequired[str]


class FileCount(TypedDict):
    """Some files together.

    Attributes:
        files: How many.
        bytes: Their size.
    """

    files: int
    bytes: int


class _OutcomeFields(TypedDict):
    """What became of any tensor.

    Attributes:
        kept: How many of its weights stay.
        bytes_before: Bytes of its data in the source.
        bytes_after: Bytes of its data in the result.
        hash: Checksum of its bytes in the folder, with the name of the algorithm.
        repaired: True where it has other weights than the source gives.
    """

    kept: int
    bytes_before: int
    bytes_after: int
    hash: NotRequired[Annotated[str, IN_FILES]]
    repaired: NotRequired[bool]


class StatisticFields(_OutcomeFields):
    """What pruning did to a tensor; see `emp_llm.report.tensor_statistics.TensorStatistics`.

    Attributes:
        n_eff_fraction_histogram_start: The first bin that `n_eff_fraction_histogram` gives. Early
            releases wrote all bins and no start; it is filled in when such a report is read.
        n_eff_fraction_histogram: Groups counted by N_eff / N, without the empty bins at both ends.
        beta: Its own β, where targets have different ones (``allocate="loss"``).
    """

    shape: _MatrixShape
    rows: _Positive
    weights: _Positive
    sparsity: float
    n_eff_min: float
    n_eff_mean: float
    n_eff_max: float
    n_eff_fraction_min: float
    n_eff_fraction_mean: float
    n_eff_fraction_max: float
    n_eff_fraction_histogram_start: NotRequired[int]
    n_eff_fraction_histogram: _Histogram
    mass: float
    retained_mass: float
    retained_mass_bound: float | None
    beta: NotRequired[_Beta]


class _DecisionFields(TypedDict):
    """Which tensor it is, and what was decided on it.

    Attributes:
        reason: Why it was pruned or not, in a few words.
        kind: What its layer is called, the same in all decoder blocks.
        block: The decoder block that it lies in; None outside of these.
        dtype: As safetensors calls it.
    """

    reason: str
    kind: str
    block: _BlockName | None
    dtype: str


class PrunedTensor(_DecisionFields, StatisticFields):
    """A tensor that was pruned.

    Attributes:
        pruned: True.
        transposed: Whether it lies [.., in, out], so that its rows are columns.
    """

    pruned: Literal[True]
    transposed: bool


class OtherTensor(_DecisionFields, _OutcomeFields):
    """A tensor that was left as it is."""

    pruned: Literal[False]
    shape: _Shape
    weights: int


TensorFields = PrunedTensor | OtherTensor
"""What a report says of one tensor; ``pruned`` tells the two apart."""


class Sums(TypedDict):
    """Sums over tensors.

    Attributes:
        tensors: How many there are.
        weights: Their weights.
        kept: How many of these stay.
        sparsity: The share of the weights that is zeroed, 0 to 1.
        bytes_before: Bytes of their data in the source.
        bytes_after: Bytes of their data in the result.
        bytes_ratio: After over before.
    """

    tensors: int
    weights: int
    kept: int
    sparsity: float
    bytes_before: int
    bytes_after: int
    bytes_ratio: float


class MassTotals(TypedDict):
    """Statistics of pruned tensors together.

    Attributes:
        n_eff_fraction_min: The smallest N_eff / N of a group.
        n_eff_fraction_mean: The mean of N_eff / N, each tensor's by its weights.
        n_eff_fraction_max: The largest N_eff / N of a group.
        retained_mass: The share of Σ|w|, or of all scores, that stays.
        retained_mass_bound: What it is at least; None where no bound holds.
    """

    n_eff_fraction_min: float
    n_eff_fraction_mean: float
    n_eff_fraction_max: float
    retained_mass: float
    retained_mass_bound: float | None


class TargetTotals(Sums, MassTotals):
    """Totals of all pruned tensors."""


class GroupTotals(TargetTotals):
    """Totals of some pruned tensors, such as those of one kind of layer.

    Attributes:
        rows: Their rows.
        n_eff_fraction_histogram: Their groups in all HISTOGRAM_BINS bins of N_eff / N.
    """

    rows: int
    n_eff_fraction_histogram: list[int]


class FileTotals(TypedDict):
    """Bytes of all files of weights: of the source, as they would be written, and if dense."""

    bytes_before: int
    bytes_after: int
    bytes_dense: int


class ReportTotals(TypedDict):
    """Totals of pruned tensors, of all tensors, and of files."""

    targets: TargetTotals
    model: Sums
    files: NotRequired[Annotated[FileTotals, NOT_IN_FILES]]


class NoteFields(TypedDict):
    """What a calibration met.

    Attributes:
        without_tokens: Matrices that no token of the data reached; magnitude decided on them.
    """

    without_tokens: NotRequired[list[str]]


class Trial(TypedDict):
    """A β that was tried.

    Attributes:
        beta: None for the dense model.
        loss: Nats per token.
        perplexity: Its exponential.
    """

    beta: float | None
    loss: float
    perplexity: float


class CurveTotals(TypedDict):
    """Sums over some targets, one number for each β of a curve."""

    kept: list[int]
    bytes: list[int]
    sparsity: list[float]
    retained_mass: list[float]


class Curve(TypedDict):
    """Sums at each of many β; see `emp_llm.pruning.beta_curve.build_curve`."""

    beta: list[float]
    targets: CurveTotals
    kinds: dict[str, CurveTotals]


class OutlierRow(TypedDict):
    """A row unlike the others of its tensor.

    Attributes:
        tensor: The tensor's name.
        row: Its number there, from 0.
        why: What is unusual, by the words of `standing_out_counts`.
        n_eff_fraction: Its N_eff / N.
        mass_ratio: Its Σ|w| over the median of the tensor's rows.
    """

    tensor: str
    row: int
    why: str
    n_eff_fraction: float
    mass_ratio: float


class ExtraFields(TypedDict):
    """What only some reports have: how β was found, what a calibration met, what is beside it.

    Attributes:
        base: Of a delta, the model that it is added to. What the report says of pruned tensors is
            then of their differences to it.
        in_base: Of a delta, the tensors that are the base's to the bit, which are not stored and
            not among `tensors`.
        target_sparsity: The share of the targets' weights to zero that β was found by.
        max_loss_increase: By how many percent the loss was allowed to rise.
        search_data: What that loss was measured on.
        calibration: What a calibration met.
        search: The β that were tried, in order.
        missing: Parameters of the model that no tensor fills, which transformers initialises.
        files: The files beside the report, by their paths in the folder; of `inspect`, files of
            weights as they would be written.
        carried: The files that were copied from the source, byte for byte.
        left_behind: The files of the source that were not, and why.
        standing_out: Rows unlike the others, the worst of them.
        standing_out_counts: How many such rows there are, by what is unusual about them.
        curve: Sums at many other β; None if they were not counted.
    """

    base: NotRequired[BaseFields]
    in_base: NotRequired[TensorCount]
    target_sparsity: NotRequired[float]
    max_loss_increase: NotRequired[float]
    search_data: NotRequired[DataFields]
    calibration: NotRequired[NoteFields]
    search: NotRequired[list[Trial]]
    missing: NotRequired[list[str]]
    files: NotRequired[Annotated[dict[str, FileFields], IN_FILES]]
    carried: NotRequired[FileCount]
    left_behind: NotRequired[list[LeftBehind]]
    standing_out: NotRequired[Annotated[list[OutlierRow], NOT_IN_FILES]]
    standing_out_counts: NotRequired[Annotated[dict[str, int], NOT_IN_FILES]]
    curve: NotRequired[Annotated[Curve | None, NOT_IN_FILES]]


class Report(ExtraFields):
    """The report of a pruning.

    Attributes:
        emp_llm_version: The release that wrote the folder.
        format: ``packed`` or ``dense``.
        format_version: The version of the packed format: 2 if tensors that are not pruned may be
            packed too, otherwise 1.
        source: Where the model came from.
        rule: What decided on the weights.
        totals: Sums over the tensors.
        tensors: Every tensor, by its name.
    """

    emp_llm_version: str
    format: OutputFormat
    format_version: int
    source: SourceFields
    rule: RuleFields
    totals: ReportTotals
    tensors: dict[str, TensorFields]
