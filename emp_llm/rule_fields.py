"""The rule as fields of reports, cards and configs, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from emp_llm.errors import FormatError, OptionError
from emp_llm.messages import encodable
from emp_llm.options import (
    Allocate,
    CalibrationOptions,
    CountBy,
    Granularity,
    PruneOptions,
    Repair,
    needs_masks,
)

__all__ = [
    "DataFields",
    "RuleFields",
    "SampleFields",
    "data_fields",
    "rule_fields",
    "rule_options",
    "rule_part",
    "with_defaults",
]

_NOT_TEXTS = ("beta", "ignore", "recover")


class SampleFields(TypedDict):
    """The samples that a calibration used.

    Attributes:
        text: The data set's or file's name.
        samples: How many samples there are.
        length: Tokens in each.
        seed: Seed of the places that they were taken from.
        hash: Checksum of their tokens, with the name of the algorithm.
    """

    text: NotRequired[str | None]
    samples: NotRequired[int | None]
    length: NotRequired[int | None]
    seed: NotRequired[int]
    sequential: NotRequired[bool | None]
    hash: NotRequired[str | None]


class DataFields(TypedDict):
    """The data that scores, repair or a search for β were taken from.

    Attributes:
        seed: Of the places that samples are taken from, and of the criterion ``random``.
        text: The data set's or file's name; no field of it, nor the ones below, where only the
            seed was needed.
        samples: How many samples.
        length: Tokens in each; None for the model's own default.
        sequential: Whether a decoder block was fed by the pruned ones before it.
        hash: Checksum of the samples' tokens, with the name of the algorithm.
    """

    seed: int
    text: NotRequired[str | None]
    samples: NotRequired[int | None]
    length: NotRequired[int | None]
    sequential: NotRequired[bool | None]
    hash: NotRequired[str | None]


class RuleFields(TypedDict):
    """The options that decide which weights stay; see `emp_llm.options.PruneOptions`."""

    beta: float
    granularity: Granularity
    criterion: str
    targets: str
    ignore: list[str]
    allocate: NotRequired[Allocate]
    count_by: NotRequired[CountBy]
    repair: NotRequired[Repair]
    recover: NotRequired[int]
    calibration: NotRequired[DataFields]


def rule_fields(options: PruneOptions, samples: SampleFields | None = None) -> RuleFields:
    """The options that decide which weights stay, by the names that configs and reports use.

    Options on scores from data are left out where they have their defaults.

    Args:
        options: The options.
        samples: What the samples of a calibration turned out to be; it replaces what was asked.
    """
    fields: RuleFields = {
        "beta": options.beta,
        "granularity": options.granularity,
        "criterion": options.criterion,
        "targets": options.targets,
        "ignore": list(options.ignore),
    }
    if options.allocate != "emp":
        fields["allocate"] = options.allocate
    if options.criterion != "magnitude" and options.count_by != "criterion":
        fields["count_by"] = options.count_by
    if options.repair != "none":
        fields["repair"] = options.repair
    if options.recover:
        fields["recover"] = options.recover
    if options.calibration is not None and needs_masks(options):
        fields["calibration"] = {**data_fields(options.calibration), **(samples or {})}
    return fields


def data_fields(calibration: CalibrationOptions) -> DataFields:
    """What was asked of a calibration; of a file only its name, so that no path is given away."""
    text = calibration.text
    if text is None:  # only the seed was needed
        return {"seed": calibration.seed}
    return {
        "text": encodable(Path(text).name if Path(text).is_file() else text),
        "samples": calibration.samples,
        "length": calibration.length,
        "seed": calibration.seed,
        "sequential": calibration.sequential,
    }


def rule_part(fields: Mapping[str, object]) -> dict[str, object]:
    """The fields of `RuleFields` that a report's rule, or a config, has.

    A field that each rule has is None where it is missing.
    """
    required = RuleFields.__required_keys__
    names = (name for name in RuleFields.__annotations__ if name in required or name in fields)
    return {name: fields.get(name) for name in names}


def with_defaults(rule: Mapping[str, object]) -> dict[str, object]:
    """A rule with the fields that `rule_fields` leaves out where they have their defaults.

    >>> with_defaults({"beta": 0.75, "repair": "obs"})
    {'allocate': 'emp', 'count_by': 'criterion', 'repair': 'obs', 'recover': 0, 'beta': 0.75}
    """
    default = PruneOptions()
    left_out = ("allocate", "count_by", "repair", "recover")
    return {**{name: getattr(default, name) for name in left_out}, **rule}


def rule_options(where: object, fields: Mapping[str, object]) -> PruneOptions:
    """The options that stand for the rule that a folder was pruned by, but for its calibration.

    Args:
        where: The file that states the rule, for errors.
        fields: The rule by the names of `RuleFields`; others may stand beside these.

    Raises:
        FormatError: If it is not a rule, or one that this release does not know.
    """
    rule: dict[str, Any] = rule_part(fields)
    rule.pop("calibration", None)
    ignore: list[Any] = rule["ignore"] if isinstance(rule["ignore"], list) else [None]
    texts = [value for name, value in rule.items() if name not in _NOT_TEXTS] + ignore
    if type(rule["beta"]) not in (int, float) or not all(isinstance(text, str) for text in texts):
        raise FormatError(
            f"{where}: states the rule {rule}, which this emp-llm cannot derive from the source; "
            "use the release that wrote it"
        )
    try:
        return PruneOptions(**{**rule, "ignore": tuple(ignore)})
    except OptionError as error:
        raise FormatError(f"{where}: states an impossible rule: {error}") from error
