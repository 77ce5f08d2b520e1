"""Which parameter of a model each tensor of a checkpoint is loaded into, transposed or not."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from emp_llm.runtime.quiet import calm
from emp_llm.structure.meta_model import build_meta_model
from emp_llm.structure.places import Place, find_places

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightTransform

__all__ = ["Landing", "land", "read_structure"]


class Landing(NamedTuple):
    """The parameter that a tensor of the checkpoint is loaded into.

    Attributes:
        name: Name of the parameter in the model; of the first one if the tensor is split.
        place: What that parameter is.
        whole: Whether the tensor is the parameter, neither split nor fused nor converted.
        flipped: Whether its last two dimensions are swapped when it is loaded.
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

    Returns:
        The parameter for each name; None if the model has no parameter for it.

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
    """Find the parameter of this model that transformers loads each tensor of a checkpoint into.

    Args:
        model: Any model of transformers, on any device.
        shapes: Shape of each tensor of the checkpoint, by name.
        conversions: The renamings and conversions that it is loaded with; they cannot be used
            again. If None, those that transformers has for the model.

    Returns:
        The parameter for each name; None if the model has no parameter for it.
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
    # in transformers' order, because some renamings depend on the names that came before
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


def _flips(operations: Iterable[object], *, same_shape: bool) -> bool:
    """Whether conversions swap the last two dimensions; some only do if the shape differs."""
    from transformers.core_model_loading import Transpose

    swaps = [operation for operation in operations if isinstance(operation, Transpose)]
    return sum(not (swap.check_dims and same_shape) for swap in swaps) % 2 == 1
