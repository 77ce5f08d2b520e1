"""Decoder blocks: how many a config says there are, and what else in it follows from their numbers.

A config may say what each block is: in lists with an item for each (``layer_types``), in lists of
some blocks' numbers (``mlp_only_layers``), or by how many come first (``first_k_dense_replace``).
All of them follow the blocks that stay. What it says by a period cannot follow: such a model is
refused by `emp_llm.shrinking.block_likeness`, unless the blocks happen to fall in with it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from emp_llm.errors import CheckpointError
from emp_llm.messages import shortened
from emp_llm.shrinking.choice import KindName
from emp_llm.shrinking.config_fields import ConfigField, ModelConfig
from emp_llm.shrinking.kind import Amounts, Kind

__all__ = ["Blocks"]

_NUMBER = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

_LISTS_OF_NUMBERS = frozenset(
    {
        *("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs"),
        *("cross_attention_layers", "rope_scaling_layers"),
    }
)
"""Fields that list the numbers of some blocks."""

_FIRST = frozenset({"first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"})
"""Fields that say how many blocks, of those that come first, are of another kind."""

_LAST = frozenset({"moe_layer_end_index"})
"""Fields that give the number of the last block of a kind."""

_CYCLES = frozenset({"block_types"})
"""Fields whose lists are gone through again and again."""

_SPARSE_STEP, _NOT_SPARSE = "decoder_sparse_step", "mlp_only_layers"
"""Every how many blocks one has experts, in Qwen's models, and which of these have none all the
same."""

_ATTENTION_TYPES = "attention_types"
"""The kinds of attention of GPT-Neo: pairs of a list and of how often it is repeated."""

_SHARED = "num_kv_shared_layers"

_NO_LISTS_OF_BLOCKS = frozenset(
    {"architectures", "bos_token_id", "eos_token_id", "pad_token_id", "keys_to_ignore_at_inference"}
)
"""Fields whose lists may be as long as there are blocks, and have nothing to do with them."""


class Blocks(Kind):
    """The decoder blocks of a model that has one list of them."""

    name: ClassVar[KindName] = "blocks"

    def amounts(self, config: ModelConfig) -> Amounts:
        """How many there are; one has to stay."""
        field = _field(config)
        return Amounts(number=field.value, field=field.name)

    def resized(self, config: ModelConfig, kept: Sequence[int]) -> dict[str, Any]:
        """The config with only these blocks, renumbered, each of its kind."""
        number = _field(config)
        changes: list[tuple[ConfigField, object]] = [(number, len(kept))]
        fields = {field.names[0]: field for field in config.beside(number)}
        for field in fields.values():
            followed = _followed(field, number.value, kept)
            if followed is not None and followed != field.value:
                changes.append((field, followed))
        return config.changed([*changes, *_without_step(fields, number.value, kept)])


def _field(config: ModelConfig) -> ConfigField:
    """The field that gives the number of decoder blocks."""
    shared = config.field([_SHARED])
    if shared is not None and shared.value:
        raise CheckpointError(
            f"config.json: {shared.name} is {shortened(shared.value)}: so many of the last blocks "
            "use keys and values of blocks before them, and would use others if some were left out"
        )
    both = config.field(["is_encoder_decoder"])
    if both is not None and both.value:
        raise CheckpointError(
            f"config.json: {both.name} is true: the model has a list of encoder blocks and one of "
            "decoder blocks, and emp-llm leaves out blocks of models that have one list"
        )
    field = config.field(_NUMBER)
    if field is None or type(field.value) is not int:
        found = "" if field is None else f"{field.name} is {shortened(field.value)}; "
        raise CheckpointError(
            f"config.json: {found}it has no number of decoder blocks ({', '.join(_NUMBER)}), so "
            "none can be left out"
        )
    if field.value < 2:
        raise CheckpointError(
            f"config.json: {field.name} is {field.value}: there is no block to leave out"
        )
    return field


def _followed(field: ConfigField, number: int, kept: Sequence[int]) -> object:
    """The value of a field once only some blocks stay; None if it does not depend on blocks."""
    name, value = field.names[0], field.value
    if name in _FIRST and type(value) is int:
        return sum(block < value for block in kept)
    if name in _LAST and type(value) is int and value >= 0:
        return sum(block <= value for block in kept) - 1
    if not isinstance(value, list | tuple) or name in _NO_LISTS_OF_BLOCKS:
        return None
    if name in _LISTS_OF_NUMBERS:
        return [new for new, block in enumerate(kept) if block in value]
    if name in _CYCLES and value:
        return [value[block % len(value)] for block in kept]
    if name == _ATTENTION_TYPES:
        kinds = [kind for part, times in value for _ in range(times) for kind in part]
        return [[[kinds[block] for block in kept], 1]]
    return [value[block] for block in kept] if len(value) == number else None


def _without_step(
    fields: dict[str, ConfigField], number: int, kept: Sequence[int]
) -> Iterator[tuple[ConfigField, Any]]:
    """Blocks that have experts at every few numbers, said by a list of those that have none."""
    step, without = fields.get(_SPARSE_STEP), fields.get(_NOT_SPARSE)
    if step is None or without is None or type(step.value) is not int or step.value < 2:
        return
    dense = {block for block in range(number) if block in without.value or (block + 1) % step.value}
    yield step, 1
    yield without, [new for new, block in enumerate(kept) if block in dense]
