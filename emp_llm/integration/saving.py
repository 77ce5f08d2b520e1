"""Saving: transformers' weight conversions, which pack what they give.

`save_pretrained` turns a model's parameters into the checkpoint's tensors by the reverse of the
conversions that it was loaded with. Those here do the same, then pack the tensors that were pruned
or packed when they were loaded. A tensor's planes share one buffer: transformers puts tensors that
share memory into one shard.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from emp_kernels.dispatch import pack_rows
from emp_kernels.errors import NonFiniteRowError
from emp_kernels.layout import RowLayout
from emp_kernels.rows import Bytes, PackedRows, Patterns, Table, Threshold, Workspace
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    WeightTransform,
)

from emp_llm.errors import OptionError, OutputError
from emp_llm.integration.tensor_readers import NUMBER_FORMATS, DenseWeights
from emp_llm.integration.weight_feed import ANYTHING, AsItIs, copy_slots
from emp_llm.runtime.pipeline import Piece, run_pieces, thread_count
from emp_llm.tensors.geometry import Geometry, RowBlock
from emp_llm.tensors.layout_choice import choose_layout, packed_bytes, sample_rows
from emp_llm.tensors.packed import PackedTensor, padding
from emp_llm.tensors.planes import META_SUFFIX, ROWS_SUFFIX

if TYPE_CHECKING:
    from transformers.utils.loading_report import LoadStateDictInfo

__all__ = [
    "PackedBefore",
    "PackingConverter",
    "PackingPlainWeights",
    "Record",
    "conversions_of",
    "densify",
    "record",
    "saved_as_in_memory",
    "set_conversions",
]

_WORSE: Final = 1.01
"""The layout from before is kept if a sample packed in it is at most this times the best size."""


@dataclass(frozen=True)
class PackedBefore:
    """How a tensor of the checkpoint was packed, or how it lies if it was pruned on loading.

    Attributes:
        transposed: Whether its rows run along the last dimension but one.
        layout: Its layout; None if it was not packed.
    """

    transposed: bool
    layout: RowLayout | None = None


class Record:
    """What was pruned or packed in a model, kept for when it is saved.

    Args:
        tensors: The checkpoint's tensors by name.
        parameters: Names of the model's parameters that they became.
        prefix: The model's `base_model_prefix`, which a checkpoint may have left out.
    """

    def __init__(
        self, tensors: Mapping[str, PackedBefore], parameters: Iterable[str], prefix: str
    ) -> None:
        self.tensors = dict(tensors)
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
            if before is None or tensor.dtype not in NUMBER_FORMATS:
                result[name] = tensor
            else:
                result.update(_pack(name, tensor, before))
        return result


class _PackingPlainWeights(_Packing):
    __slots__ = ()

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        if source_key not in self.record.parameters:
            return source_key, None
        return source_key, ANYTHING


def conversions_of(model: PreTrainedModel) -> list[WeightTransform]:
    """The conversions that a model was loaded with and is saved with."""
    return getattr(model, "_weight_conversions", None) or []


def set_conversions(model: PreTrainedModel, conversions: list[WeightTransform]) -> None:
    """Change the conversions that a model is saved with."""
    model._weight_conversions = conversions  # type: ignore[assignment]


def record(model: PreTrainedModel) -> Record | None:
    """What was pruned or packed in a model; None if it was not loaded through emp-llm."""
    for conversion in conversions_of(model):
        if isinstance(conversion, PackingConverter):
            return conversion.record
    return None


def densify(model: PreTrainedModel) -> PreTrainedModel:
    """Have a model saved as an ordinary checkpoint with zeros, which loads without emp-llm.

    Its weights are dense in memory already and stay as they are.

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
    _save_as_before(model)
    ordinary = [
        conversion.original if isinstance(conversion, PackingConverter) else conversion
        for conversion in conversions_of(model)
        if not isinstance(conversion, PackingPlainWeights)
    ]
    set_conversions(model, ordinary)
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


def _pack(name: str, tensor: torch.Tensor, before: PackedBefore) -> dict[str, torch.Tensor]:
    """Pack a tensor, in its layout from before if that is still a good one; planes by name."""
    geometry = Geometry(
        number_format=NUMBER_FORMATS[tensor.dtype],
        shape=tuple(tensor.shape),
        transposed=before.transposed,
    )
    weights = DenseWeights(tensor.detach().cpu().contiguous(), geometry)
    try:
        layout = _layout(weights, before.layout)
        tables, records = _pack_blocks(weights, layout)
    except NonFiniteRowError as error:
        raise OutputError(
            f"{name!r} holds NaN or infinity, which are not packed: call emp_llm.densify(model) "
            "first to save the model as it is"
        ) from error
    return _planes(name, PackedTensor(geometry, layout), tables, records)


def _layout(weights: DenseWeights, before: RowLayout | None) -> RowLayout:
    """The layout from before, or the best one if training has changed the weights too much."""
    geometry = weights.geometry
    workspace = Workspace()
    sample = sample_rows(geometry, lambda block: weights.rows(block, workspace))
    rule = _what_is_there(sample, geometry)
    best = choose_layout(sample, geometry, rule)
    if before is None or before.number_format is not best.number_format:
        return best
    sizes = [packed_bytes(sample, layout, rule) for layout in (before, best)]
    return before if sizes[0] <= sizes[1] * _WORSE else best


def _what_is_there(rows: Patterns, geometry: Geometry) -> Threshold:
    """The rule that keeps every weight but +0.0.

    -0.0 has the same magnitude, and ties are kept from the first on; so if there is a -0.0, all
    zeros up to the last one are kept, +0.0 too.
    """
    key_mask = geometry.number_format.key_mask
    negative = np.flatnonzero(rows.reshape(-1) == rows.dtype.type(key_mask + 1))
    if not negative.size:
        return Threshold(0, 0)
    zeros = rows.reshape(-1)[: negative[-1] + 1] & rows.dtype.type(key_mask) == 0
    return Threshold(0, int(np.count_nonzero(zeros)))


def _pack_blocks(weights: DenseWeights, layout: RowLayout) -> tuple[list[Table], list[Bytes]]:
    geometry = weights.geometry
    tables: list[Table] = []
    records: list[Bytes] = []

    def compute(block: RowBlock, workspace: Workspace) -> PackedRows:
        rows = weights.rows(block, workspace)
        return pack_rows(rows, layout, _what_is_there(rows, geometry), workspace=workspace)

    def settle(packed: PackedRows) -> None:
        tables.append(packed.table)
        records.append(packed.payload.copy())

    pieces = (
        Piece(geometry.block_bytes(block), partial(compute, block), settle)
        for block in geometry.row_blocks()
    )
    run_pieces(pieces, threads=thread_count(None))
    return tables, records


def _planes(
    name: str, packed: PackedTensor, tables: list[Table], records: list[Bytes]
) -> dict[str, torch.Tensor]:
    """The planes, in one buffer."""
    used = sum(part.size for part in records)
    table, meta = packed.encode_table(np.concatenate(tables)), packed.encode_meta()
    ends = np.cumsum([used + len(padding(used)), len(table), len(meta)])
    tail = np.frombuffer(padding(used) + table + meta, np.uint8)
    buffer = torch.empty(int(ends[-1]), dtype=torch.uint8)
    np.concatenate([*records, tail], out=buffer.numpy())
    first, second, _ = ends.tolist()
    return {
        name: buffer[:first],
        name + ROWS_SUFFIX: buffer[first:second],
        name + META_SUFFIX: buffer[second:].view(torch.int64),
    }
