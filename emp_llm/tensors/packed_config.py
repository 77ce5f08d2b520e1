"""What ``config.json`` says of a packed checkpoint."""

from collections.abc import Mapping
from typing import Any, Final

__all__ = [
    "FORMAT_VERSION",
    "QUANT_METHOD",
    "is_packed",
    "quant_method",
    "quantization_config",
]

FORMAT_VERSION: Final = 1
"""Version of the format that is written, and the only one that is read; see ``FORMAT.md``."""

QUANT_METHOD: Final = "emp"
"""The name by which transformers finds what loads a packed checkpoint."""


def quantization_config(rule: Mapping[str, Any]) -> dict[str, Any]:
    """The ``quantization_config`` of a packed checkpoint that was pruned by this rule."""
    return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, **rule}


def quant_method(config: Mapping[str, Any]) -> object:
    """The ``quant_method`` that a configuration names; None if it names none.

    >>> quant_method({"quantization_config": {"quant_method": "gptq", "bits": 4}})
    'gptq'
    """
    quantization = config.get("quantization_config")
    return quantization.get("quant_method") if isinstance(quantization, dict) else None


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a checkpoint packed by emp-llm."""
    return quant_method(config) == QUANT_METHOD
