"""Neurons of MLPs: how many a config says there are, and how matrices are made of them."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from emp_llm.errors import CheckpointError
from emp_llm.messages import shortened
from emp_llm.shrinking.choice import KindName
from emp_llm.shrinking.config_fields import HIDDEN, ConfigField, ModelConfig
from emp_llm.shrinking.kind import Amounts, Kind, Resized

__all__ = ["Neurons"]

_NUMBER = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff")
_EXPERT = re.compile(r"expert|router", re.IGNORECASE)
_DEFAULT = 4
"""How many neurons there are for each value of a hidden state where the field is None."""

_FUSED = 2
"""A matrix of twice the neurons holds their gates, and behind these their up projections."""


class Neurons(Kind):
    """The neurons between the two projections of a dense MLP; those of experts are not counted."""

    name: ClassVar[KindName] = "neurons"

    def amounts(self, config: ModelConfig) -> Amounts:
        """How many there are."""
        field = _field(config)
        return Amounts(number=field.value, field=field.name)

    def resized(self, config: ModelConfig, kept: Sequence[int]) -> dict[str, Any]:
        """The config with narrower MLPs."""
        return config.changed([(_field(config), len(kept))])

    def widths(self, resized: Resized) -> tuple[int, ...] | None:
        """One row, column or bias for each neuron, or two in two segments.

        Raises:
            CheckpointError: If the neurons are those of experts.
        """
        parts = resized.name.split(".")
        modules = [".".join(parts[:end]) for end in range(len(parts))]
        kinds = [type(resized.model.get_submodule(name)).__name__ for name in modules]
        if any(map(_EXPERT.search, (*parts, *kinds))):
            raise CheckpointError(
                f"config.json: the model's experts have the width that it gives ({resized.name!r} "
                f"has {resized.before} of it), and emp-llm removes neurons of dense MLPs only: "
                "choose --experts"
            )
        widths = super().widths(resized)
        return (1,) * _FUSED if widths == (_FUSED,) else widths if widths == (1,) else None


def _field(config: ModelConfig) -> ConfigField:
    """The field that gives the number of neurons, and how many they are.

    Raises:
        CheckpointError: If there is none.
    """
    field = config.field(_NUMBER)
    hidden, blank = config.field(HIDDEN), config.blank(_NUMBER)
    if field is None and blank is not None and hidden is not None:
        field = replace(blank, value=_DEFAULT * hidden.value)
    if field is None or type(field.value) is not int or field.value < 1:
        found = "" if field is None else f"; {field.name} is {shortened(field.value)}"
        raise CheckpointError(
            f"config.json: has no field that gives one width for all MLPs ({' or '.join(_NUMBER)})"
            f"{found}: emp-llm cannot write a config with fewer neurons"
        )
    return field
