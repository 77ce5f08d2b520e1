"""What happens before, while and after transformers loads a model."""

import copy
import re
import weakref
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TypedDict

from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightTransform
from transformers.quantizers.base import HfQuantizer

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.shard import Shard, read_shard
from emp_llm.errors import CheckpointError, FormatError, OptionError
from emp_llm.integration.configs import EmpConfig, PackedConfig
from emp_llm.integration.keeping import Keeper
from emp_llm.integration.saving import (
    PackingConverter,
    PackingPlainWeights,
    Record,
    conversions_of,
    set_conversions,
)
from emp_llm.integration.weight_feed import FedConverter, FedPlainWeights, Feed, Placement
from emp_llm.loading.tensor_readers import PruningReader, TensorReader, UnpackingReader
from emp_llm.resident.packing import PackedBefore
from emp_llm.runtime.pipeline import thread_count
from emp_llm.selection.selection import select
from emp_llm.structure.landing import land
from emp_llm.structure.places import find_places
from emp_llm.structure.targets import decide, decide_targets
from emp_llm.structure.wrapped_names import check_names
from emp_llm.tensors.packed_config import WHOLE_VERSION
from emp_llm.tensors.packed_reader import PackedReader, open_shard
from emp_llm.tensors.planes import META_SUFFIX, ROWS_SUFFIX
from emp_llm.tensors.target import Target
from emp_llm.tensors.whole_reader import WholeReader

__all__ = ["PackedQuantizer", "PruningQuantizer"]


_PARALLELISM = {
    "tp_size": "tensor parallelism",
    "fsdp_size": "fully sharded data parallelism",
    "dp_size": "fully sharded data parallelism",
    "pp_size": "pipeline parallelism",
}
"""The kind of parallelism that each size in transformers' DistributedConfig stands for."""


class _Quantizer(HfQuantizer):
    """What both quantizers share.

    transformers creates one for each `from_pretrained` and calls, in this order:
    `preprocess_model` once the model is built on the meta device, `update_weight_conversions`,
    `validate_environment` with the device map, and `postprocess_model` at the end.
    """

    requires_calibration = False

    def __init__(self, quantization_config: EmpConfig | PackedConfig, **options: object) -> None:
        super().__init__(quantization_config, **options)
        self._open = ExitStack()
        self._finalize = weakref.finalize(self, self._open.close)
        self._placement: Placement | None = None

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        device_map: object = None,
        checkpoint_files: Sequence[str] | None = None,
        **_: object,
    ) -> None:
        _refuse_parallel(model)
        self._model = model
        self._placement = Placement(model)
        self.validate_environment(device_map=device_map)
        self._shards = _open_shards(checkpoint_files)
        self._files = self._open.enter_context(OpenFiles())
        # With it transformers reads all tensors at once, on threads of its own; without, it asks
        # for one tensor at a time and converts it before it asks for the next.
        self.pre_quantized = False

    def validate_environment(self, *_: object, device_map: object = None, **__: object) -> None:
        """Keep the device map; the one of the last call says where each module is put."""
        if self._placement is not None and isinstance(device_map, dict):
            self._placement.device_map = device_map

    def update_weight_conversions(
        self,
        weight_conversions: list[WeightTransform],
        *_: object,  # the model, which transformers gives from 5.21 on
        **__: object,
    ) -> list[WeightTransform]:
        """Have the model's conversions get pruned or unpacked tensors."""
        placement = self._placement
        if placement is None:
            raise RuntimeError("transformers asked for conversions before it had built the model")
        try:
            readers, planes = self._open_readers(self._model, weight_conversions)
        except BaseException:
            self._finalize()
            raise
        sizes = {
            entry.name: entry.nbytes for shard in self._shards for entry in shard.header.tensors
        }
        self._feed = Feed(readers, sizes, planes, placement, self._open, self._keeper())
        self._unexpected = self._model._keys_to_ignore_on_load_unexpected
        self._model._keys_to_ignore_on_load_unexpected = _with_planes(self._unexpected, planes)
        return [
            *(
                FedConverter(conversion, self._feed)
                if isinstance(conversion, WeightConverter)
                else conversion
                for conversion in weight_conversions
            ),
            FedPlainWeights(self._feed),
        ]

    @abstractmethod
    def _open_readers(
        self, model: PreTrainedModel, conversions: list[WeightTransform]
    ) -> tuple[dict[str, TensorReader], list[str]]:
        """Readers of the tensors by name, and names of planes that no parameter is loaded from."""

    @abstractmethod
    def _keeper(self) -> Keeper | None:
        """What keeps weights packed; None if they are to be dense in memory."""

    @abstractmethod
    def _check_loaded(self) -> None:
        """Check that nothing was left out."""

    @abstractmethod
    def _packed_before(self) -> dict[str, PackedBefore]:
        """How each tensor lies or was packed, for when it is saved."""

    @abstractmethod
    def _packed_config(self) -> PackedConfig:
        """The quantization_config of the saved model."""

    def _process_model_after_weight_loading(
        self,
        model: PreTrainedModel,
        **_: object,
    ) -> PreTrainedModel:
        """Make it an ordinary model, except for how it is saved."""
        self._finalize()
        self._check_loaded()
        self._prepare_saving(model)
        if self._feed.placement.tied_on_disk():  # transformers takes them for two parameters
            model.tie_weights(recompute_mapping=False)
        _make_ordinary(model)
        model._keys_to_ignore_on_load_unexpected = self._unexpected
        return model

    def _prepare_saving(self, model: PreTrainedModel) -> None:
        """Have the model saved packed, as it was loaded."""
        config = self._packed_config()
        record = Record(
            self._packed_before(),
            self._feed.parameters,
            model.base_model_prefix,
            packs_rest=config.format_version == WHOLE_VERSION,
        )
        set_conversions(
            model, [PackingPlainWeights(record), *_packing(conversions_of(model), record)]
        )
        model.config.quantization_config = config

    def is_serializable(self) -> bool:
        """The model can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The model can be trained."""
        return True


class _Rule(TypedDict):
    targets: str
    ignore: tuple[str, ...]


class PruningQuantizer(_Quantizer):
    """Prunes every target while it is loaded."""

    quantization_config: EmpConfig

    def _open_readers(
        self, model: PreTrainedModel, conversions: list[WeightTransform]
    ) -> tuple[dict[str, TensorReader], list[str]]:
        options = self.quantization_config.options()
        entries = {
            entry.name: (shard, entry) for shard in self._shards for entry in shard.header.tensors
        }
        tensors = {name: (entry.dtype, entry.shape) for name, (_, entry) in entries.items()}
        shapes = {name: shape for name, (_, shape) in tensors.items()}
        self._landings = land(model, shapes, copy.deepcopy(conversions))
        folder = self._shards[0].path.parent
        check_names(str(folder), model, shapes, self._landings)
        rule: _Rule = {"targets": options.targets, "ignore": options.ignore}
        if options.granularity == "model":
            # The group is all targets of the checkpoint; the class that is loaded may lack some.
            decisions = decide_targets(folder, tensors, **rule)
        else:
            decisions = decide(str(folder), tensors, self._landings, **rule)
        self._targets = {
            name: Target.of(*entries[name], transposed=decision.transposed)
            for name, decision in decisions.items()
            if decision.prune
        }
        selection = select(self._targets.values(), options, self._files, threads=thread_count(None))
        return {
            name: PruningReader(target, self._files.file(target.shard), selection)
            for name, target in self._targets.items()
        }, []

    def _keeper(self) -> Keeper | None:
        config = self.quantization_config
        if not config.keep_packed:
            return None
        return Keeper(self._model, self._packed_before(), packs_rest=config.rest == "packed")

    def _check_loaded(self) -> None:
        wanted = {name for name in self._targets if self._landings[name] is not None}
        passed = sorted(wanted - self._feed.delivered)
        if passed:
            raise CheckpointError(
                f"{passed[0]!r} was loaded without being pruned ({len(passed)} of "
                f"{len(wanted)} targets): transformers renames it in a way that emp-llm "
                "does not know; prune the checkpoint with `emp-llm prune` and load the result"
            )

    def _packed_before(self) -> dict[str, PackedBefore]:
        return {
            name: PackedBefore(target.geometry.transposed) for name, target in self._targets.items()
        }

    def _packed_config(self) -> PackedConfig:
        return PackedConfig.of(self.quantization_config.options())


class PackedQuantizer(_Quantizer):
    """Unpacks every packed tensor while it is loaded."""

    quantization_config: PackedConfig

    def _open_readers(
        self,
        model: PreTrainedModel,
        conversions: list[WeightTransform],
    ) -> tuple[dict[str, TensorReader], list[str]]:
        self._packed: dict[str, PackedReader | WholeReader] = {}
        plain: list[TensorEntry] = []
        for shard in self._shards:
            readers, others = self._open_shard(shard)
            self._packed.update(readers)
            plain.extend(others)
        _check_no_plane_alone(model, conversions, plain)
        planes = [
            plane.name
            for reader in self._packed.values()
            for plane in (reader.planes.rows, reader.planes.meta)
        ]
        return {name: UnpackingReader(packed) for name, packed in self._packed.items()}, planes

    def _open_shard(
        self, shard: Shard
    ) -> tuple[dict[str, PackedReader | WholeReader], list[TensorEntry]]:
        """A reader of each packed tensor of a shard, and its plain tensors."""
        return open_shard(shard, self._files.file(shard))

    def _keeper(self) -> Keeper | None:
        if not self.quantization_config.keep_packed:
            return None
        packs_rest = self.quantization_config.format_version == WHOLE_VERSION
        return Keeper(self._model, {}, packs_rest=packs_rest)

    def _check_loaded(self) -> None:
        places = find_places(self._model)
        missing = sorted(
            name
            for name in self._feed.missing
            if (place := places.get(name)) and place.why_not is None and place.block
        )
        if missing:
            raise FormatError(
                f"{self._shards[-1].path.parent}: has no weights for {missing[0]!r} and "
                f"{len(missing) - 1} other linear layers of {type(self._model).__name__}, which "
                "transformers has initialized at random: download or prune the checkpoint again, "
                "or load it with the config that it came with"
            )

    def _packed_before(self) -> dict[str, PackedBefore]:
        return {
            name: PackedBefore(reader.geometry.transposed, reader.packed.layout)
            for name, reader in self._packed.items()
            if isinstance(reader, PackedReader)
        }

    def _packed_config(self) -> PackedConfig:
        return self.quantization_config.loaded()


def _refuse_parallel(model: PreTrainedModel) -> None:
    config = getattr(model.config, "distributed_config", None)
    kinds = [
        f"{kind} (over {size} processes)"
        for name, kind in _PARALLELISM.items()
        if (size := getattr(config, name, None) or 1) > 1
    ]
    if kinds:
        raise OptionError(
            f"{kinds[0]} splits weights as they are read, but a row is pruned and unpacked as a "
            "whole: load with device_map instead, or load what `emp-llm prune --format dense` or "
            "`emp-llm unpack` writes, without EmpConfig"
        )


def _open_shards(checkpoint_files: Sequence[str] | None) -> list[Shard]:
    if not checkpoint_files:
        raise CheckpointError(
            "from_pretrained was given no checkpoint: pass a folder or a model of the Hub, not a "
            "state_dict"
        )
    return [read_shard(Path(file)) for file in checkpoint_files]


def _with_planes(ignored: Iterable[str] | None, planes: Sequence[str]) -> set[str]:
    """Patterns of tensors that transformers ignores if no parameter matches, planes among them."""
    suffixes = (ROWS_SUFFIX, META_SUFFIX) if planes else ()
    return {*(ignored or ()), *(re.escape(suffix) + "$" for suffix in suffixes)}


def _check_no_plane_alone(
    model: PreTrainedModel, conversions: list[WeightTransform], plain: Sequence[TensorEntry]
) -> None:
    """Refuse a plane of records that lacks its row table and its meta."""
    bytes_ = {
        entry.name: entry.shape for entry in plain if entry.dtype == "U8" and len(entry.shape) == 1
    }
    if not bytes_:
        return
    for name, landing in land(model, bytes_, copy.deepcopy(conversions)).items():
        if landing is not None and landing.place.why_not is None:
            raise FormatError(
                f"packed tensor {name!r} lacks its planes {name + ROWS_SUFFIX!r} and "
                f"{name + META_SUFFIX!r}: the checkpoint was taken apart; pack or download it again"
            )


def _packing(conversions: Sequence[WeightTransform], record: Record) -> Iterator[WeightTransform]:
    """The conversions that a model was loaded with, in their form for saving."""
    for conversion in conversions:
        if isinstance(conversion, FedPlainWeights):
            continue
        if isinstance(conversion, FedConverter):
            yield PackingConverter(conversion.original, record)
        else:
            yield conversion


def _make_ordinary(model: PreTrainedModel) -> None:
    """Remove what transformers attaches to quantized models, which restricts their use."""
    del model.hf_quantizer, model.quantization_method
    model.is_quantized = False  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.__dict__.pop("_is_quantized", None)
