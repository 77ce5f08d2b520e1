"""Groups of heads: key-value heads with their query heads, in a config and in matrices.

A config counts query heads and key-value heads, and each of these serves as many query heads as all
others. What stays must have heads of the same size, so the config must have a field for that.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from emp_llm.errors import CheckpointError
from emp_llm.messages import shortened
from emp_llm.shrinking.choice import KindName
from emp_llm.shrinking.config_fields import HIDDEN, ConfigField, ModelConfig
from emp_llm.shrinking.kind import Amounts, Kind, Resized

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["KvHeads"]

_HEADS = ("num_attention_heads", "n_head", "num_heads")
_GROUPS = ("num_key_value_heads", "num_kv_heads")
_SIZE = "head_dim"

_SAME = (_SIZE, "scaling", "rotary_ndims", "num_key_value_groups")
"""What attention modules know of heads, however many there are."""

_FUSED = ("Phi3Attention", "Phi4MultimodalAttention")
"""Attention whose ``qkv_proj`` holds all queries, behind them all keys, then all values."""


class KvHeads(Kind):
    """The key-value heads of each attention layer, each with the query heads that read it."""

    name: ClassVar[KindName] = "kv heads"

    def amounts(self, config: ModelConfig) -> Amounts:
        """How many there are.

        Raises:
            CheckpointError: If there is only one, or the config does not say how many.
        """
        _, groups = _counts(config)
        if groups.value == 1:
            raise CheckpointError(
                f"config.json: {groups.name} is 1, and a model needs one kv head: leave out "
                "--kv-heads"
            )
        return Amounts(number=groups.value, field=groups.name)

    def resized(self, config: ModelConfig, kept: Sequence[int]) -> dict[str, Any]:
        """The config with fewer heads of both sorts, of the size that they have."""
        heads, groups = _counts(config)
        queries = heads.value // groups.value
        changes = [(heads, queries * len(kept)), (groups, len(kept))]
        size = config.field((_SIZE,))
        if size is None or size.path != heads.path:
            hidden = config.field(HIDDEN)
            value = 0 if hidden is None else hidden.value // heads.value
            size = ConfigField(heads.path, (_SIZE,), value)
        return config.changed([*changes, (size, size.value)])

    def compared(self, amounts: Amounts) -> int:
        """The most that are a whole share of all: other numbers need not divide the hidden size."""
        return max(n for n in range(1, amounts.number) if amounts.number % n == 0)

    def obstacle(self, full: "PreTrainedModel", reduced: "PreTrainedModel") -> str | None:
        """Heads may change when they become fewer, or be shared by layers."""
        others = dict(reduced.named_modules())
        for name, module in full.named_modules():
            kind = type(module).__name__
            if getattr(module, "is_kv_shared_layer", False):
                return (
                    f"{name!r} ({kind}) takes keys and values from another layer: emp-llm removes "
                    "no kv heads of such models"
                )
            for attribute in _SAME:
                before = getattr(module, attribute, None)
                after = getattr(others.get(name), attribute, None)
                if isinstance(before, int | float) and before != after:
                    return (
                        f"config.json has no field that would keep {attribute} of {kind} (such as "
                        f"{_SIZE}): with fewer kv heads it would be {after} in place of {before}"
                    )
        return None

    def widths(self, resized: Resized) -> tuple[int, ...] | None:
        """The rows or columns of a group: of a key head, of its query heads, or one for each head.

        Raises:
            CheckpointError: If heads depend on each other, or do not have one size.
        """
        parent, _, _ = resized.name.rpartition(".")
        module, parameter = resized.model.get_submodule(parent), resized.name
        if "Norm" in type(module).__name__ and resized.model.get_parameter(parameter).ndim == 1:
            raise CheckpointError(
                f"config.json: {parameter!r} normalizes all heads together ({resized.before} "
                "values), so that none can go without a change in the others: emp-llm removes no "
                "kv heads of this model"
            )
        width, found = super().widths(resized), _attention(resized.model, parameter)
        if width is None or found is None:
            return None
        attention, size = found
        text = resized.model.config.get_text_config(decoder=True)
        queries = text.num_attention_heads // resized.number
        if type(attention).__name__ in _FUSED and parent.endswith(".qkv_proj"):
            fused = (queries * size, size, size)
            return fused if sum(fused) == width[0] else None
        # queries with a gate for each, as in Qwen3-Next, are twice as wide
        twice = 2 * queries * size if parent.endswith(".q_proj") else 0
        return width if width[0] in (1, queries, size, queries * size, twice) else None


def _counts(config: ModelConfig) -> tuple[ConfigField, ConfigField]:
    """The fields that give the number of query heads, and of key-value heads.

    They are the same where each query head has keys of its own.

    Raises:
        CheckpointError: If there are none.
    """
    heads = _count(config.field(_HEADS))
    groups = config.field(_GROUPS)
    if groups is None or groups.path != heads.path:
        return heads, heads
    if heads.value % _count(groups).value:
        raise CheckpointError(
            f"config.json: {heads.name} {heads.value} is no multiple of {groups.name} "
            f"{groups.value}: no model has such groups"
        )
    return heads, groups


def _count(field: ConfigField | None) -> ConfigField:
    """A field that counts heads.

    Raises:
        CheckpointError: If it is missing or does not.
    """
    if field is None or type(field.value) is not int or field.value < 1:
        found = "" if field is None else f"; {field.name} is {shortened(field.value)}"
        raise CheckpointError(
            "config.json: has no field that gives one number of heads for all layers "
            f"({' or '.join(_HEADS)}){found}: emp-llm cannot write a config with fewer kv heads"
        )
    return field


def _attention(model: "PreTrainedModel", parameter: str) -> "tuple[nn.Module, int] | None":
    """The innermost module around a parameter that knows the size of its heads, and this."""
    parts = parameter.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module = model.get_submodule(".".join(parts[:end]))
        size = getattr(module, _SIZE, None)
        if isinstance(size, int):
            return module, size
    return None
