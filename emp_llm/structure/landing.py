"""Which parameter of a model each tensor of a checkpoint is loaded into, transposed or not."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from emp_llm.structure.places import Place, find_places

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightTransform

__all__ = ["Landing", "land"]


class Landing(NamedTuple):
    """The parameter that a tensor of the checkpoint is loaded into.

    Attributes:
        name: Name of the parameter in the model; of the first one if the tensor is split.
        place: What that parameter is.
        whole: Whether the tensor is the parameter, neither split nor fused nor converted.
        flipped: Whether its last two dimensions are swapped when it is loaded.
        others: Names of the further parameters that the tensor is split into.
    """

    name: str
    place: Place
    whole: bool
    flipped: bool
    others: tuple[str, ...] = ()


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
    by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
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
        if pattern is None:
            yield name, Landing(found, places[found], whole=True, flipped=False)
            continue
        converter = by_pattern[pattern]
        flipped = _flips(converter.operations, same_shape=shapes[name] == places[found].shape)
        # the name is made by the first of the converter's target patterns
        first, *further = converter.target_patterns
        others = tuple(found.replace(first, target) for target in further)
        yield name, Landing(found, places[found], whole=False, flipped=flipped, others=others)


def _flips(operations: Iterable[object], *, same_shape: bool) -> bool:
    """Whether conversions swap the last two dimensions; some only do if the shape differs."""
    from transformers.core_model_loading import Transpose

    swaps = [operation for operation in operations if isinstance(operation, Transpose)]
    return sum(not (swap.check_dims and same_shape) for swap in swaps) % 2 == 1
