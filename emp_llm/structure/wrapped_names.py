"""Names that a wrapper around the model has changed, so that no tensor fits the model any more."""

import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Final

from emp_llm.errors import CheckpointError
from emp_llm.structure.landing import Landing, land

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["check_names"]

_WRAPPERS: Final = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel, DistributedDataParallel or DeepSpeed",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "_forward_module.": "Lightning Fabric",
}
"""What wrappers put before the names of the module inside them, and who does."""

_ADAPTER: Final = ("base_model.model.", "base_layer.", "modules_to_save.default.")
_MOST_PARTS = 3  # of a prefix that is in neither list


def check_names(
    where: str,
    model: "PreTrainedModel",
    shapes: Mapping[str, tuple[int, ...]],
    landings: Mapping[str, Landing | None],
) -> None:
    """Refuse names that fit the model only without what a wrapper has added to them.

    Args:
        where: The checkpoint, for errors.
        model: Its model, on any device.
        shapes: Shape of each tensor of the checkpoint, by name.
        landings: The parameter that each tensor is loaded into, by the tensor's name.

    Raises:
        CheckpointError: If there are such names, or if no tensor has a place in the model.
    """
    lost = [name for name, landing in landings.items() if landing is None]
    filled = {landing.name for landing in landings.values() if landing is not None}
    if not lost:
        return

    def fit_without(added: Collection[str]) -> bool:
        """Whether some of the lost tensors become parameters that no other tensor becomes."""
        parts = re.compile(rf"(?<![^.])(?:{'|'.join(map(re.escape, added))})")
        names = {parts.sub("", name): () for name in lost}
        found = land(model, names).values()
        return any(one is not None and one.name not in filled for one in found)

    kind = type(model).__name__
    found = f"{where}: {len(lost)} of {len(shapes)} tensors have no place in {kind}"
    added = [part for part in (*_ADAPTER, *_WRAPPERS) if _occurs(part, lost)]
    if added and fit_without(added):
        raise CheckpointError(f"{found}: {_explanation(added, lost)}")
    if flat := next((name for name in lost if name.endswith("flat_param")), None):
        raise CheckpointError(
            f"{found}, such as {flat!r}, in which FSDP keeps the parameters of a module one behind "
            "the other: save a full state dict (StateDictType.FULL_STATE_DICT)"
        )
    if filled:
        return
    for prefix in _common_prefixes(lost):
        if fit_without([prefix]):
            raise CheckpointError(
                f"{found}: their names begin with {prefix!r}, which a trainer or a larger model "
                "puts before the names of the model inside: save that model itself, or cut it off"
            )
    raise CheckpointError(
        f"{found}, such as {lost[0]!r}: the config is not that of these weights, or they have "
        "another library's names: convert them with the script of transformers for this model"
    )


def _occurs(part: str, names: Collection[str]) -> bool:
    """Whether a part of a name, which ends with a dot, is in one of the names."""
    return any(f".{part}" in f".{name}" for name in names)


def _explanation(added: Collection[str], names: Collection[str]) -> str:
    if adapter := [part for part in added if part in _ADAPTER]:
        example = next(name for name in names if _occurs(adapter[-1], [name]))
        return (
            f"{example!r} is a name inside a PEFT model: merge the adapter first "
            "(merge_and_unload), and save what that returns"
        )
    wrappers = " and ".join(f"{part!r}, which {_WRAPPERS[part]} adds" for part in added)
    return f"their names hold {wrappers}: save the model that is inside, or cut this out of them"


def _common_prefixes(names: Collection[str]) -> list[str]:
    """What all names begin with, up to a dot, the shortest first."""
    parts = next(iter(names)).split(".")[:-1][:_MOST_PARTS]
    prefixes = [".".join(parts[: n + 1]) + "." for n in range(len(parts))]
    return [prefix for prefix in prefixes if all(name.startswith(prefix) for name in names)]
