"""Whether a checkpoint has all that its model needs, and what transformers would make up at random.

A parameter is *missing* if neither a tensor nor a tied parameter fills it and transformers would
report that it has initialised it. That is no fault of a head that is to be trained. It is one of a
linear layer that other decoder blocks have, and of what the checkpoint's own index lists.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emp_llm.errors import CheckpointError
from emp_llm.runtime.quiet import calm
from emp_llm.structure.landing import Landing, land
from emp_llm.structure.meta_model import build_meta_model
from emp_llm.structure.places import Place, find_places
from emp_llm.structure.stored_forms import check_not_quantized
from emp_llm.structure.wrapped_names import check_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Structure", "check_complete", "read_structure"]

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
_INCOMPLETE = (
    "the checkpoint is incomplete, or its config describes more blocks than were saved; save or "
    "download it again"
)


@dataclass(frozen=True, kw_only=True)
class Structure:
    """A checkpoint's tensors beside the parameters of its model.

    Attributes:
        model: The name of the model's class.
        landings: The parameter that each tensor is loaded into, by the tensor's name; None if the
            model has no parameter for it.
        missing: The parameters that transformers would initialise, by name, in the model's order.
        lacking: Of the tensors that the index lists and no file has, those that would fill a
            missing parameter.
    """

    model: str
    landings: Mapping[str, Landing | None]
    missing: Mapping[str, Place]
    lacking: tuple[str, ...]


def read_structure(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any] | None = None,
    listed: Iterable[str] = (),
    where: str | None = None,
) -> Structure:
    """Find the parameter that each tensor of a checkpoint is loaded into, and which get none.

    A **decoder block** (or encoder block) is an element of a ``ModuleList`` that holds a linear
    layer, and that is a ``GradientCheckpointingLayer`` of transformers, as decoder and encoder
    layers are, or holds an attention module but no such layer. If these are nested, the outermost
    counts.

    A module is **attention**, with all that it holds, if the name of its class says so
    (``LlamaAttention``, ``T5LayerSelfAttention``; not ``JambaAttentionDecoderLayer`` and the like,
    which hold an MLP as well), or the name of its attribute (``attn``, ``self_attn``,
    ``linear_attn``, ``attention``).

    A **router** is known by the name of its class or attribute (``router``, ``gate``,
    ``shared_expert_gate``), because in some models it is a plain linear layer.

    Args:
        folder: The checkpoint's folder; only its ``config.json`` is read.
        shapes: Shape of each tensor of the checkpoint, by name.
        config: The content of ``config.json`` if the folder has none.
        listed: Names of tensors that the checkpoint's index lists and no file has.
        where: What the user calls the checkpoint, for errors; by default its folder.

    Raises:
        CheckpointError: As `emp_llm.structure.meta_model.build_meta_model` and
            `emp_llm.structure.wrapped_names.check_names` do.
    """
    with calm():
        model = build_meta_model(folder, len(shapes), config)
        landings = land(model, shapes)
        check_names(str(folder) if where is None else where, model, shapes, landings)
        missing = _missing(model, landings)
        to_come = land(model, dict.fromkeys(listed, ())).items()
        return Structure(
            model=type(model).__name__,
            landings=landings,
            missing=missing,
            lacking=tuple(name for name, one in to_come if one and one.name in missing),
        )


def _missing(model: "PreTrainedModel", landings: Mapping[str, Landing | None]) -> dict[str, Place]:
    """The parameters of a model that are filled by no tensor and by none that they are tied to."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = getattr(model, "all_tied_weights_keys", {})

    def weight(name: str) -> int | str:
        """What all names of one weight have in common."""
        name = tied.get(name, name)
        return id(parameters[name]) if name in parameters else name

    filled = {
        weight(name)
        for landing in landings.values()
        if landing is not None
        for name in (landing.name, *landing.others)
    }
    allowed = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    places = find_places(model)
    return {
        name: places[name]
        for name, parameter in parameters.items()
        if weight(name) not in filled
        and parameter.numel()
        and not any(pattern.search(name) for pattern in allowed)
    }


def check_complete(where: str, structure: Structure, listed: Mapping[str, str]) -> None:
    """Refuse a checkpoint that has lost tensors; other missing parameters are no fault.

    Args:
        where: The checkpoint, for errors.
        structure: Its structure.
        listed: The tensors that its index lists and no file has, with the file that it names.

    Raises:
        CheckpointError: If a listed tensor would fill a missing parameter; if a linear layer, or
            one of its experts, is missing that other decoder blocks have; or if the checkpoint has
            other layers in the place of missing ones.
    """
    lost = [name for name, place in structure.missing.items() if place.block and not place.why_not]
    if structure.lacking or lost:
        check_not_quantized(where, structure.landings)
    if structure.lacking:
        name = structure.lacking[0]
        raise CheckpointError(
            f"{where}: {listed[name]} lacks tensor {name!r}, which the index lists and "
            f"{structure.model} needs ({len(structure.lacking)} missing): fetch that file again "
            "or, if it is published so, ask its makers for a complete one"
        )
    present = {_any_block(one.name) for one in structure.landings.values() if one is not None}
    if odd := next((name for name in lost if _any_block(name) in present), None):
        raise CheckpointError(
            f"{where}: no tensor gives {odd!r} of {structure.model} ({len(lost)} missing), "
            f"which other blocks have: {_INCOMPLETE}"
        )
    for name, found, others in _partly_given(structure.landings):
        raise CheckpointError(
            f"{where}: {found} tensors give {name!r} of {structure.model}, and {others} in another "
            f"block: {_INCOMPLETE}"
        )
    if stray := next(_in_place_of(lost, structure.landings), None):
        raise CheckpointError(
            f"{where}: {structure.model} has no place for {stray!r}, and no tensor gives its "
            f"{lost[0]!r}: the weights and the config do not belong together"
        )
    if blocks := _lists_of_blocks(structure.missing.values()) - _lists_of_blocks(
        one.place for one in structure.landings.values() if one is not None
    ):
        raise CheckpointError(
            f"{where}: no tensor belongs to the blocks {min(blocks)!r} of {structure.model}: save "
            "all of the model or, if it is a part, name the part's class under architectures in "
            "config.json"
        )


def _lists_of_blocks(places: Iterable[Place]) -> set[str]:
    """The lists of decoder blocks that parameters are in, by the name of any of their blocks."""
    return {_any_block(place.block) for place in places if place.block is not None}


def _partly_given(landings: Mapping[str, Landing | None]) -> Iterator[tuple[str, int, int]]:
    """Parameters that are merged of fewer tensors, such as experts, than in another block.

    Yields:
        The parameter's name, how many tensors it is merged of, and the most that another one is.
    """
    merged = [one for one in landings.values() if one is not None and not (one.whole or one.others)]
    counts = Counter((one.name, _any_block(one.name), one.place.shape) for one in merged)
    most: Counter[tuple[str, tuple[int, ...] | None]] = Counter()
    for (_, anywhere, shape), count in counts.items():
        most[anywhere, shape] = max(most[anywhere, shape], count)
    for (name, anywhere, shape), count in counts.items():
        if count < most[anywhere, shape]:
            yield name, count, most[anywhere, shape]


def _any_block(name: str) -> str:
    return _NUMBER.sub("*", name)


def _in_place_of(lost: Iterable[str], landings: Mapping[str, Landing | None]) -> Iterator[str]:
    """Tensors that the model has no place for, in the modules of missing parameters."""
    modules = {module for name in lost for module in _modules(name)}
    for name, landing in landings.items():
        if landing is None and not modules.isdisjoint(_modules(name)):
            yield name


def _modules(name: str) -> Iterator[tuple[str, ...]]:
    """The module that holds a tensor, and the one that holds that one, by the end of their path."""
    *path, _ = name.split(".")
    yield tuple(path[-3:])
    yield tuple(path[:-1][-3:])
