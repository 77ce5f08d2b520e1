"""Where the tensors of a checkpoint land in a model: which parameter, and which way round."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from emp_llm.runtime.quiet import calm
from emp_llm.structure.meta_model import build_meta_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightTransform
from emp_llm.structure.places import Place, find_places

__all__ = ["Landing", "land", "read_structure"]


class Landing(NamedTuple):
    """Where a tensor of the checkpoint goes.

    Attributes:
        name: Name of the parameter in the model; of the first one, where it becomes several.
        place: What that parameter is.
        whole: Whether the tensor becomes the parameter as it is.
        flipped: Whether its last two dimensions are swapped on the way.
    """

    name: str
    place: Place
    whole: bool
    flipped: bool


def read_structure(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    config: Mapping[str, Any] | None = None,
) -> dict[str, Landing | None]:
    """Find, for each tensor of a checkpoint, the parameter that transformers loads it into.

    A **block** is an element of a ``ModuleList`` that holds a linear layer and is one of
    transformers' ``GradientCheckpointingLayer`` s, as decoder and encoder layers are; or that
    holds an attention module and no such layer. The outermost one counts.

    A module is **attention** if its class says so (``LlamaAttention``, ``T5LayerSelfAttention``;
    not ``JambaAttentionDecoderLayer`` and the like, which hold an MLP as well) or its attribute
    does (``attn``, ``self_attn``, ``linear_attn``, ``attention``), and so is all it holds.

    A **router** is known by its class or its attribute (``router``, ``gate``,
    ``shared_expert_gate``), because in some models it is a plain linear layer.

    Args:
        folder: The checkpoint's folder; only its ``config.json`` is read.
        shapes: The checkpoint's tensors, name to shape.
        config: The content of ``config.json``, where it is in no folder.

    Returns:
        For each name where it goes, or None where the model has no place for it.

    Raises:
        CheckpointError: See `emp_llm.structure.meta_model.build_meta_model`.
    """
    with calm():
        model = build_meta_model(folder, len(shapes), config)
        return land(model, shapes)


def land(
    model: "PreTrainedModel",
    shapes: Mapping[str, tuple[int, ...]],
    conversions: Iterable["WeightTransform"] | None = None,
) -> dict[str, Landing | None]:
    """Find where transformers loads each tensor of a checkpoint into this model.

    Args:
        model: Any model of transformers, on any device.
        shapes: The checkpoint's tensors, name to shape.
        conversions: The renamings and conversions that it is loaded with, which this uses up;
            those that transformers has for it if None.

    Returns:
        For each name where it goes, or None where the model has no place for it.
    """
    from transformers import conversion_mapping

    entries = (
        conversion_mapping.get_model_conversion_mapping(model)
        if conversions is None
        else conversions
    )
    return dict(_land(model, find_places(model), shapes, list(entries)))


def _land(
    model: "PreTrainedModel",
    places: Mapping[str, Place],
    shapes: Mapping[str, tuple[int, ...]],
    entries: "list[WeightTransform]",
) -> Iterator[tuple[str, Landing | None]]:
    """Rename each tensor as ``convert_and_load_state_dict_in_model`` does."""
    from transformers import core_model_loading

    renamings = [e for e in entries if isinstance(e, core_model_loading.WeightRenaming)]
    converters = [e for e in entries if isinstance(e, core_model_loading.WeightConverter)]
    operations = {
        p: converter.operations for converter in converters for p in converter.source_patterns
    }
    prefix, state = model.base_model_prefix, model.state_dict()
    rename = core_model_loading.rename_source_key
    # In transformers' order, because some renamings depend on the names before.
    for name in sorted(shapes, key=core_model_loading.dot_natural_key):
        found, pattern = rename(name, renamings, converters, prefix, state)
        if found not in state and name in state:
            found, pattern = rename(name, [], [], prefix, state)
        if found not in places:
            yield name, None
            continue
        flipped = pattern is not None and _flips(
            operations[pattern], same_shape=shapes[name] == places[found].shape
        )
        yield name, Landing(found, places[found], pattern is None, flipped)


def _flips(operations: Iterable[Any], *, same_shape: bool) -> bool:
    from transformers.core_model_loading import Transpose

    swaps = [operation for operation in operations if isinstance(operation, Transpose)]
    return sum(not (swap.check_dims and same_shape) for swap in swaps) % 2 == 1
