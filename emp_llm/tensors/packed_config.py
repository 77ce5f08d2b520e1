"""What ``config.json`` says of a packed checkpoint."""

from collections.abc import Mapping
from typing import Any, Final

from emp_llm.errors import FormatError

__all__ = [
    "DELTA_METHOD",
    "KNOWN_VERSIONS",
    "PRUNED_VERSION",
    "QUANT_METHOD",
    "WHOLE_VERSION",
    "check_version",
    "format_version",
    "is_delta",
    "is_packed",
    "quant_method",
    "quantization_config",
]

PRUNED_VERSION: Final = 1
"""Version of the format that packed tensors which are pruned have; see ``FORMAT.md``."""

WHOLE_VERSION: Final = 2
"""Version that packed tensors have of which all weights stay."""

KNOWN_VERSIONS: Final = (PRUNED_VERSION, WHOLE_VERSION)
"""Versions that this release reads."""

QUANT_METHOD: Final = "emp"
"""The name by which transformers finds what loads a packed checkpoint."""

DELTA_METHOD: Final = "emp_delta"
"""The same for one whose pruned tensors are differences to a base. Releases that do not know deltas
refuse it, where they would take differences for weights."""


def format_version(*, rest_packed: bool) -> int:
    """The version that a packed checkpoint has by whether tensors are packed that are not pruned.

    A packed checkpoint has the highest version that one of its tensors may have: if the rest is
    plain it has version 1, which older releases can read.
    """
    return WHOLE_VERSION if rest_packed else PRUNED_VERSION


def check_version(config: Mapping[str, Any]) -> None:
    """Refuse a ``quantization_config`` of a version that this release does not know.

    Raises:
        FormatError: If it is one.
    """
    version = config.get("format_version")
    if version not in KNOWN_VERSIONS:
        raise FormatError(
            f"config.json: the checkpoint is packed in version {version} of the format; this "
            f"emp-llm reads versions {KNOWN_VERSIONS[0]} to {KNOWN_VERSIONS[-1]}: install a "
            "release that knows it"
        )


def quantization_config(
    rule: Mapping[str, Any], version: int, base: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The ``quantization_config`` of a packed checkpoint.

    Args:
        rule: The rule that it was pruned by.
        version: Its version, see `format_version`.
        base: The base, if it is a delta; see `emp_llm.report.fields.BaseFields`.
    """
    if base is None:
        return {"quant_method": QUANT_METHOD, "format_version": version, **rule}
    return {
        "quant_method": DELTA_METHOD,
        "format_version": version,
        "base": dict(base),
        **rule,
    }


def quant_method(config: Mapping[str, Any]) -> object:
    """The ``quant_method`` that a configuration names; None if it names none.

    >>> quant_method({"quantization_config": {"quant_method": "gptq", "bits": 4}})
    'gptq'
    """
    quantization = config.get("quantization_config")
    return quantization.get("quant_method") if isinstance(quantization, dict) else None


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a checkpoint packed by emp-llm, a delta among them."""
    return quant_method(config) in (QUANT_METHOD, DELTA_METHOD)


def is_delta(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a packed checkpoint which is added to a base."""
    return quant_method(config) == DELTA_METHOD
