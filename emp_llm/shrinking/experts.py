"""Experts of a mixture: how many a config says there are, and what else in it counts them."""

from collections.abc import Sequence
from typing import Any, ClassVar

from emp_llm.errors import CheckpointError
from emp_llm.messages import shortened
from emp_llm.shrinking.choice import KindName
from emp_llm.shrinking.config_fields import ConfigField, ModelConfig
from emp_llm.shrinking.kind import Amounts, Kind

__all__ = ["Experts"]

_NUMBER = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_PICKED = (
    *("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"),
    *("experts_per_token", "moe_top_k"),
)
"""How many of them the router picks for a token."""

_GROUPS = ("n_group", "num_expert_group")
_PICKED_GROUPS = ("topk_group",)
_LEAST_IN_GROUP = 2
"""DeepSeek-V3 and those after it score a group by the two best of its experts."""


class Experts(Kind):
    """The routed experts of each layer that has any; shared experts are not among them."""

    name: ClassVar[KindName] = "experts"

    def amounts(self, config: ModelConfig) -> Amounts:
        """How many there are, and the fewest that the router can pick from."""
        field = _field(config)
        number: int = field.value
        picked = config.field(_PICKED)
        groups = _whole(config.field(_GROUPS), 1)
        if groups == 1:
            return Amounts(
                number=number, least=_whole(picked, 1), why_least=_named(picked), field=field.name
            )
        if number % groups:
            raise CheckpointError(
                f"config.json: {number} experts do not make {_named(config.field(_GROUPS))} groups "
                "of equal size: the router of this model cannot work"
            )
        taken = config.field(_PICKED_GROUPS)
        in_group = max(_LEAST_IN_GROUP, -(-_whole(picked, 1) // _whole(taken, groups)))
        set_by = (picked, config.field(_GROUPS), taken)
        why = ", ".join(_named(one) for one in set_by if one is not None)
        return Amounts(
            number=number,
            least=in_group * groups,
            groups=groups,
            why_least=why,
            field=field.name,
        )

    def resized(self, config: ModelConfig, kept: Sequence[int]) -> dict[str, Any]:
        """The config with fewer experts; the router picks as many of them as before."""
        return config.changed([(_field(config), len(kept))])


def _field(config: ModelConfig) -> ConfigField:
    """The field that gives the number of experts."""
    field = config.field(_NUMBER)
    if field is None or field.value in (0, 1):
        raise CheckpointError(
            f"config.json: the model has no experts to choose from (no {' or '.join(_NUMBER)} "
            "above 1): give a mixture of experts"
        )
    if type(field.value) is not int or field.value < 0:
        raise CheckpointError(
            f"config.json: {field.name} is {shortened(field.value)}; emp-llm shrinks models with "
            "one number of experts for all layers"
        )
    return field


def _whole(field: ConfigField | None, otherwise: int) -> int:
    """The value of a field that counts, or another one if there is none or it is no number."""
    return field.value if field is not None and type(field.value) is int else otherwise


def _named(field: ConfigField | None) -> str:
    return "" if field is None else f"{field.name} {shortened(field.value)}"
