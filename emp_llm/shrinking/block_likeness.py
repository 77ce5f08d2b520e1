"""Whether each decoder block is, under its new number, what it was under its old one.

A block's kind may follow from its number: whether it attends to a window, has experts, or rotates
its keys. The modules that transformers builds for it show all of that, however the config says it.
"""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from emp_llm.errors import CheckpointError
from emp_llm.messages import shortened

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["check_alike"]

_PERIODS = re.compile(
    r"period|offset|interval|pattern|freq|_step$|every|_indices$|_idxs$|shared_layers|layer_idx$"
    r"|_start_index$|_end_index$"
)
"""Fields of configs by which a block's kind follows from its number."""

_PLAIN = bool | int | float | str | None


def check_alike(full: "PreTrainedModel", reduced: "PreTrainedModel", kept: Sequence[int]) -> None:
    """Check that the blocks of a model are those that stay of another.

    Args:
        full: A model, on the meta device.
        reduced: The one that the new config gives.
        kept: The numbers of the blocks that stay, ascending.

    Raises:
        CheckpointError: If one of them would be of another kind; the message names the fields of
            the config that set kinds by numbers.
    """
    from torch import nn

    of_reduced = dict(reduced.named_modules())
    for name, module in full.named_modules():
        fewer = of_reduced.get(name)
        if not isinstance(module, nn.ModuleList) or not isinstance(fewer, nn.ModuleList):
            continue
        if len(fewer) != len(kept) or len(module) <= len(fewer):
            continue
        for new, old in enumerate(kept):
            difference = next(_differences(module[old], fewer[new], kept, new), None)
            if difference is not None:
                raise CheckpointError(_message(full.config, f"{name}.{old}", new, difference))


def _differences(
    block: "nn.Module", other: "nn.Module", kept: Sequence[int], number: int
) -> Iterator[str]:
    """What is not alike in two blocks.

    Args:
        block: One of the old model.
        other: The one that takes its place.
        kept: The old numbers of all blocks that stay.
        number: The new one of this.
    """
    parts = dict(other.named_modules())
    for name, module in block.named_modules():
        part = parts.pop(name, None)
        where = f"{name}." if name else ""
        if type(part) is not type(module):
            yield f"{where}{type(module).__name__} would be {type(part).__name__}"
            continue
        found = vars(part)
        for attribute, old in vars(module).items():
            new = found.get(attribute)
            if attribute.startswith("_") or not _plain(old) or old == new:
                continue
            if not _renumbered(old, new, kept, number):
                yield f"{where}{attribute} {shortened(old)} would be {shortened(new)}"
    yield from (f"there would be a {name}" for name in parts)


def _renumbered(old: object, new: object, kept: Sequence[int], number: int) -> bool:
    """Whether a value is a block's own number, or a list with an item for each block."""
    if isinstance(old, list | tuple):
        return len(old) > kept[-1] and [old[block] for block in kept] == new
    return type(old) is int and (old, new) == (kept[number], number)


def _plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return isinstance(value, _PLAIN)


def _message(config: "PretrainedConfig", block: str, new: int, difference: str) -> str:
    text = config.get_text_config(decoder=True)
    fields = {
        name: value
        for name, value in text.to_dict().items()
        if _PERIODS.search(name) and isinstance(value, int | str | list) and value is not False
    }
    said = ", ".join(f"{name} {shortened(value)}" for name, value in fields.items())
    by = f" ({said})" if said else ""
    return (
        f"config.json cannot say what is left: as block {new}, {block} would be of another kind "
        f"({difference}), for kinds follow from numbers{by}: keep other blocks"
    )
