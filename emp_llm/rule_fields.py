"""The rule as reports, cards and configs spell it, and back."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from emp_llm.errors import FormatError, OptionError
from emp_llm.options import CalibrationOptions, PruneOptions, needs_masks

__all__ = ["rule_fields", "rule_options", "told_rule"]


def rule_fields(options: PruneOptions, data: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The options that decide which weights stay, by the names that configs and reports use.

    What is asked of scores from data is there only where it is not the default.

    Args:
        options: The options.
        data: What a calibration found out of its data, beyond what was asked for.
    """
    fields: dict[str, Any] = {
        "beta": options.beta,
        "granularity": options.granularity,
        "criterion": options.criterion,
        "targets": options.targets,
        "ignore": list(options.ignore),
    }
    if options.criterion != "magnitude" and options.count_by != "criterion":
        fields["count_by"] = options.count_by
    if options.repair != "none":
        fields["repair"] = options.repair
    calibration = options.calibration
    if calibration is not None and needs_masks(options):
        fields["calibration"] = _calibration_fields(calibration) | dict(data or {})
    return fields


def _calibration_fields(calibration: CalibrationOptions) -> dict[str, Any]:
    """What was asked of a calibration; of a file no more than its name, to give nothing away."""
    text = calibration.text
    if text is None:  # it was the seed only that was needed
        return {"seed": calibration.seed}
    return {
        "text": Path(text).name if Path(text).is_file() else text,
        "samples": calibration.samples,
        "length": calibration.length,
        "seed": calibration.seed,
        "sequential": calibration.sequential,
    }


def told_rule(told: Mapping[str, Any]) -> dict[str, Any]:
    """What a report's rule, or a config, tells by the names of `rule_fields`."""
    optional = ("count_by", "repair", "calibration")
    return {name: told.get(name) for name in rule_fields(PruneOptions())} | {
        name: told[name] for name in optional if name in told
    }


def rule_options(where: object, rule: Mapping[str, Any]) -> PruneOptions:
    """The options that stand for the rule that a folder was pruned by, but for its calibration.

    Args:
        where: What tells of the rule, for errors.
        rule: By the names that `emp_llm.rule_fields.rule_fields` uses.

    Raises:
        FormatError: If it is no rule, or one that this release does not know.
    """
    told = told_rule(rule)
    told.pop("calibration", None)
    ignore: list[Any] = told["ignore"] if isinstance(told["ignore"], list) else [None]
    texts = [value for name, value in told.items() if name not in ("beta", "ignore")] + ignore
    if type(told["beta"]) not in (int, float) or not all(isinstance(text, str) for text in texts):
        raise FormatError(
            f"{where}: tells of the rule {told}, which this emp-llm cannot derive from the source; "
            "use the release that wrote it"
        )
    try:
        return PruneOptions(**{**told, "ignore": tuple(ignore)})
    except OptionError as error:
        raise FormatError(f"{where}: tells of an impossible rule: {error}") from error
