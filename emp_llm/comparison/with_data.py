"""EMP with scores and repair from data, at the same counts, as options of `prune`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from emp_llm.comparison.costs import WithData
from emp_llm.options import PRESETS, CalibrationOptions, PruneOptions

__all__ = ["options_with_data"]

_FIELDS: Mapping[WithData, Mapping[str, Any]] = {
    "wanda": {"criterion": "wanda", "count_by": "magnitude"},
    "obs": {"criterion": "obs", "count_by": "magnitude"},
    "emp-repaired": {"repair": "obs"},
    "obs-repaired": PRESETS["repaired"],
}


def options_with_data(
    method: WithData, rule: PruneOptions, calibration: CalibrationOptions
) -> PruneOptions:
    """The options of a method. Every row keeps as many weights as by the rule.

    Args:
        method: What is done with the data.
        rule: EMP's options, without data.
        calibration: The data.

    >>> from emp_llm import CalibrationOptions
    >>> options_with_data("wanda", PruneOptions(), CalibrationOptions(text="ptb")).criterion
    'wanda'
    """
    # tensors that are not pruned are the same in both forms, and copied in less time
    return replace(rule, rest="plain", calibration=calibration, **_FIELDS[method])
