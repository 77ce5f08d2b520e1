"""Saving: transformers' weight conversions, which pack what they give.

`save_pretrained` turns a model's parameters into the checkpoint's tensors by the reverse of the
conversions that it was loaded with. Those here do the same, then pack the tensors that were pruned
or packed when they were loaded.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)

from emp_llm.errors import OptionError
from emp_llm.integration.keeping import unpack_parameters
from emp_llm.integration.weight_feed import ANYTHING, AsItIs, copy_slots
from emp_llm.resident.dense_weights import NUMBER_FORMATS
from emp_llm.resident.held_planes import HeldPlanes
from emp_llm.resident.packing import PackedBefore, pack_rest, pack_tensor
from emp_llm.resident.weight import PackedWeight
from emp_llm.structure.places import find_places

if TYPE_CHECKING:
    from transformers.utils.loading_report import LoadStateDictInfo

__all__ = [
    "PackingConverter",
    "PackingPlainWeights",
    "Record",
    "conversions_in_use",
    "conversions_of",
    "densify",
    "own_names_packed",
    "record",
    "saved_as_in_memory",
    "set_conversions",
    "without_packing",
]


class Record:
    """What was pruned or packed in a model, kept for when it is saved.

    Args:
        tensors: The checkpoint's tensors by name.
        parameters: Names of the model's parameters that those became which are pruned.
        prefix: The model's `base_model_prefix`, which a checkpoint may have left out.
        packs_rest: Whether tensors that are not pruned are packed too, without loss.
    """

    def __init__(
        self,
        tensors: Mapping[str, PackedBefore],
        parameters: Iterable[str],
        prefix: str,
        *,
        packs_rest: bool,
    ) -> None:
        self.tensors = dict(tensors)
        self.packs_rest = packs_rest
        self.parameters = frozenset(parameters)
        self._prefix = f"{prefix}."

    def __deepcopy__(self, _memo: object) -> "Record":
        return self

    def find(self, name: str) -> PackedBefore | None:
        """How the tensor of this name was packed; None if it was not."""
        names = (name, name.removeprefix(self._prefix), self._prefix + name)
        return next((self.tensors[name] for name in names if name in self.tensors), None)


class PackingConverter(WeightConverter):
    """A converter of the model whose reverse packs.

    Args:
        original: The converter.
        record: What is to be packed.
    """

    __slots__ = ("original", "record")

    def __init__(self, original: WeightConverter, record: Record) -> None:
        copy_slots(original, self)
        self.original = original
        self.record = record

    def reverse_transform(self) -> WeightTransform:
        """The original's reverse, which packs what it gives."""
        return _Packing(self.original.reverse_transform(), self.record)


class PackingPlainWeights(PackingConverter):
    """Leaves parameters as they are on loading, and packs them on saving.

    Args:
        record: What is to be packed.
    """

    __slots__ = ()

    def __init__(self, record: Record) -> None:
        super().__init__(WeightConverter(ANYTHING, ANYTHING, [AsItIs()]), record)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """No match: this one is for saving only."""
        return source_key, None

    def reverse_transform(self) -> WeightTransform:
        """What packs parameters that no conversion changes."""
        return _PackingPlainWeights(self.original, self.record)


class _AsInMemory(PackingPlainWeights):
    """Packs nothing, and keeps how the model is saved at other times."""

    __slots__ = ("config", "conversions")

    def __init__(
        self,
        record: Record,
        conversions: list[WeightTransform],
        config: object,
    ) -> None:
        super().__init__(record)
        self.conversions = conversions
        self.config = config

    def reverse_transform(self) -> WeightTransform:
        """Itself: its pattern matches no parameter."""
        return self


class _Packing(WeightConverter):
    __slots__ = ("record",)

    def __init__(self, reverse: WeightTransform, record: Record) -> None:
        copy_slots(reverse, self)
        self.record = record

    def convert(
        self,
        layer_name: str,
        model: PreTrainedModel | None = None,
        config: object = None,
        hf_quantizer: object = None,
        loading_info: "LoadStateDictInfo | None" = None,
    ) -> dict[str, torch.Tensor]:
        made: dict[str, Any] = super().convert(
            layer_name, model, config, hf_quantizer, loading_info
        )
        checkpoint_name = _renaming([] if model is None else conversions_of(model))
        result: dict[str, torch.Tensor] = {}
        for name, value in made.items():
            tensor = value[0] if isinstance(value, list) else value
            before = self.record.find(name) or self.record.find(checkpoint_name(name))
            planes = self._pack(name, tensor, before)
            result.update({name: tensor} if planes is None else planes.planes(name))
        return result

    def _pack(
        self, name: str, tensor: torch.Tensor, before: PackedBefore | None
    ) -> HeldPlanes | None:
        """The planes of a tensor; None if it is saved plainly."""
        if tensor.dtype not in NUMBER_FORMATS:
            return None
        if isinstance(tensor, PackedWeight):
            if tensor.content.is_whole_planes:
                return tensor.content.planes[0].on_cpu()
            tensor = tensor.unpacked()
        if before is not None:
            return pack_tensor(name, tensor, before)
        return pack_rest(tensor) if self.record.packs_rest else None


class _PackingPlainWeights(_Packing):
    __slots__ = ()

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        packs = self.record.packs_rest or source_key in self.record.parameters
        return source_key, ANYTHING if packs else None


def conversions_of(model: PreTrainedModel) -> list[WeightTransform]:
    """The conversions that a model was loaded with and is saved with."""
    return getattr(model, "_weight_conversions", None) or []


def set_conversions(model: PreTrainedModel, conversions: list[WeightTransform]) -> None:
    """Change the conversions that a model is saved with."""
    model._weight_conversions = conversions  # type: ignore[assignment]


@contextmanager
def conversions_in_use(
    model: PreTrainedModel, conversions: list[WeightTransform]
) -> Iterator[None]:
    """Have a model saved with other conversions inside the block."""
    before = model._weight_conversions
    set_conversions(model, conversions)
    try:
        yield
    finally:
        model._weight_conversions = before


def without_packing(model: PreTrainedModel) -> list[WeightTransform]:
    """The conversions of a model without what packs."""
    return [
        conversion.original if isinstance(conversion, PackingConverter) else conversion
        for conversion in conversions_of(model)
        if not isinstance(conversion, PackingPlainWeights)
    ]


def own_names_packed(model: PreTrainedModel, known: Record) -> list[WeightTransform]:
    """Conversions that pack parameters under their own names.

    Args:
        model: A model.
        known: Its record.
    """
    places = find_places(model)
    tensors = {
        name: known.find(name) or PackedBefore(places[name].transposed)
        for name in known.parameters & places.keys()
    }
    own = Record(tensors, known.parameters, model.base_model_prefix, packs_rest=known.packs_rest)
    return [PackingPlainWeights(own)]


def record(model: PreTrainedModel) -> Record | None:
    """What was pruned or packed in a model; None if it was not loaded through emp-llm."""
    for conversion in conversions_of(model):
        if isinstance(conversion, PackingConverter):
            return conversion.record
    return None


def densify(model: PreTrainedModel) -> PreTrainedModel:
    """Have a model saved as an ordinary checkpoint with zeros, which loads without emp-llm.

    Weights that are dense in memory stay as they are; those that were kept packed are unpacked,
    one after the other, and can be trained from then on.

    >>> from transformers import AutoModelForCausalLM
    >>> from emp_llm import EmpConfig
    >>> model = AutoModelForCausalLM.from_pretrained(
    ...     "demo/model", quantization_config=EmpConfig(beta=1.0)
    ... )
    >>> densify(model).save_pretrained("dense")
    >>> "quantization_config" in model.config.to_dict()
    False

    Args:
        model: A model that was pruned while it was loaded, or loaded from a packed checkpoint.

    Returns:
        The same model.

    Raises:
        OptionError: If it is neither.
    """
    if record(model) is None:
        raise OptionError(
            f"this {type(model).__name__} would not be saved packed: it was neither loaded from a "
            "packed checkpoint nor pruned by EmpConfig"
        )
    unpack_parameters(model)
    _save_as_before(model)
    set_conversions(model, without_packing(model))
    del model.config.quantization_config
    return model


@contextmanager
def saved_as_in_memory(model: PreTrainedModel) -> Iterator[None]:
    """Have a model save its parameters as they are, under their own names, inside the block.

    transformers' ``Trainer`` reads its checkpoints back without weight conversions: packed tensors,
    and experts that the model fuses, would not be loaded again.

    Args:
        model: Any model; one that knows of nothing pruned is saved like that anyway.
    """
    known = record(model)
    if known is None:
        yield
        return
    _save_as_before(model)
    mine = _AsInMemory(known, conversions_of(model), model.config.quantization_config)
    set_conversions(model, [mine])
    del model.config.quantization_config
    try:
        yield
    finally:
        # Another training may have begun since, if this one was interrupted.
        if any(conversion is mine for conversion in conversions_of(model)):
            _save_as_before(model)


def _save_as_before(model: PreTrainedModel) -> None:
    for conversion in conversions_of(model):
        if isinstance(conversion, _AsInMemory):
            set_conversions(model, conversion.conversions)
            model.config.quantization_config = conversion.config


def _renaming(conversions: Sequence[WeightTransform]) -> Callable[[str], str]:
    """The function that turns names that converters give into names of the checkpoint."""
    renamings = [
        conversion.reverse_transform()
        for conversion in reversed(conversions)
        if isinstance(conversion, WeightRenaming)
    ]

    def rename(name: str) -> str:
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        return name

    return rename
