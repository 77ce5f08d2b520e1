"""transformers' weight conversions, fed with tensors that are already pruned or unpacked.

For each parameter, transformers collects the checkpoint's tensors that become it, converts them and
sets the result. The converters here collect tensors from `Feed` instead of reading the file. So
every conversion gets whole dense tensors under the checkpoint's names, and tensors are pruned as
the checkpoint holds them, before they are merged, split or cast.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightTransform,
    build_glob_alternation,
)
from transformers.integrations.accelerate import get_device

from emp_llm.integration.keeping import Keeper
from emp_llm.loading.read_ahead import Holding, Job, MadeElsewhere, ReadAhead, Reading
from emp_llm.loading.tensor_readers import TensorReader, UnpackingReader
from emp_llm.runtime.device_trial import device_of_kernels
from emp_llm.runtime.pipeline import thread_count
from emp_llm.tensors.geometry import WholeGeometry

if TYPE_CHECKING:
    from transformers.utils.loading_report import LoadStateDictInfo

__all__ = [
    "ANYTHING",
    "AsItIs",
    "FedConverter",
    "FedPlainWeights",
    "Feed",
    "Placement",
    "copy_slots",
]

ANYTHING = ".*"
"""The pattern of converters that do not choose tensors by a pattern."""


class Placement:
    """Where transformers puts each parameter, and in which dtype.

    Args:
        model: The model that is being loaded, on the meta device.

    Attributes:
        device_map: The device of each module, as far as transformers has decided; None for the CPU.
        shapes: Each parameter's shape by its name.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.device_map: dict[str, torch.device | str | int] | None = None
        state = model.state_dict()
        self.shapes = {name: tensor.shape for name, tensor in state.items()}
        self._dtypes = {name: tensor.dtype for name, tensor in state.items()}
        self._prefix = f"{model.base_model_prefix}."
        self._tied: dict[str, str] = model.all_tied_weights_keys
        dtype = model.config.dtype  # of the model as it is built, not as it was asked for
        self._plan: dict[str, torch.dtype] = (
            model._get_dtype_plan(dtype) if isinstance(dtype, torch.dtype) else {}
        )
        self._planned, self._patterns, _ = build_glob_alternation(list(self._plan))

    def device(self, name: str) -> torch.device | str | int:
        """The device of a parameter; the CPU if it is offloaded to the disk."""
        return get_device(self.device_map or {"": "cpu"}, name, valid_torch_device=True)

    def on_disk(self, name: str) -> bool:
        """Whether a parameter is offloaded to the disk; its name may lack the model's prefix."""
        names = (name, self._prefix + name, name.removeprefix(self._prefix))
        known = next((name for name in names if name in self._dtypes), None)
        return known is not None and get_device(self.device_map or {"": "cpu"}, known) == "disk"

    def tied_on_disk(self) -> dict[str, str]:
        """The parameters on the disk that are tied to others there, and these."""
        return {
            name: source
            for name, source in self._tied.items()
            if self.on_disk(name) and self.on_disk(source)
        }

    def dtype(self, name: str) -> torch.dtype | None:
        """The dtype of a parameter."""
        planned = self._planned.search(name) if self._plan else None
        if planned is not None and planned.lastgroup is not None:
            return self._plan[self._patterns[planned.lastgroup]]
        return self._dtypes.get(name)


class Feed:
    """The tensors that are pruned or unpacked, as transformers asks for them.

    Args:
        readers: What reads each of them, by its name in the checkpoint.
        sizes: Bytes of every tensor of the checkpoint, by name.
        planes: Names of row tables and metas of packed tensors, which no parameter is loaded from.
        placement: Where parameters are put.
        resources: Closed if a tensor cannot be made; the threads that read ahead end with it.
        keeper: What keeps weights packed; None if they are dense in memory.

    Attributes:
        delivered: Names of the tensors that transformers has got.
        parameters: Names, in the model, of the parameters made from those that are pruned.
    """

    def __init__(
        self,
        readers: Mapping[str, TensorReader],
        sizes: Mapping[str, int],
        planes: Iterable[str],
        placement: Placement,
        resources: ExitStack,
        keeper: Keeper | None = None,
    ) -> None:
        self._keeper = keeper
        self.placement = placement
        self.delivered: set[str] = set()
        self.parameters: set[str] = set()
        self._readers = readers
        self._pruned = {
            name
            for name, reader in readers.items()
            if not isinstance(reader.geometry, WholeGeometry)
        }
        self._sizes = sizes
        self._planes = frozenset(planes)
        self._ahead = ReadAhead(thread_count(None))
        self._resources = resources
        resources.callback(self._ahead.close)
        self._loading_info: LoadStateDictInfo | None = None

    def __deepcopy__(self, _memo: object) -> "Feed":
        return self  # transformers copies converters for each tensor; all copies share one feed

    def offers(self, name: str) -> bool:
        """Whether a name of the checkpoint is that of a tensor, not of a plane beside it."""
        return name not in self._planes

    def wants(self, name: str) -> bool:
        """Whether a tensor that no converter of the model matches is to come from here.

        A plain tensor that is offloaded to the disk is not: transformers leaves it in its file.
        """
        return self.offers(name) and (name in self._readers or not self.placement.on_disk(name))

    def announce(
        self, name: str, target: str, pattern: str, plain: Callable[[], torch.Tensor]
    ) -> Callable[[], torch.Tensor]:
        """Announce that transformers will want a tensor.

        Args:
            name: Its name in the checkpoint.
            target: The parameter that it becomes; the first one if it becomes several.
            pattern: The pattern of the converter that matched it.
            plain: Reads it from the file and places it; used if it is neither pruned nor packed.

        Returns:
            A function that waits for the tensor.
        """
        reader = self._readers.get(name)
        keeper = None if self.placement.on_disk(target) else self._keeper
        job = self._job(name, reader, target, plain, keeps=keeper is not None)
        self._ahead.add(job, target, pattern)

        def make() -> torch.Tensor:
            tensor = self._take(job)
            if reader is not None:
                self.delivered.add(name)
                tensor = tensor.to(self.placement.device(target), self.placement.dtype(target))
            return tensor if keeper is None else keeper.pack(name, tensor)

        return make

    def _job(
        self,
        name: str,
        reader: TensorReader | None,
        target: str,
        plain: Callable[[], torch.Tensor],
        *,
        keeps: bool,
    ) -> Job:
        if reader is None:
            return MadeElsewhere(plain, self._sizes.get(name, 0))
        if not keeps:
            return Reading(reader, device_of_kernels(self.placement.device(target)))
        return Holding(reader) if isinstance(reader, UnpackingReader) else Reading(reader)

    def _take(self, job: Job) -> torch.Tensor:
        try:
            return self._ahead.take(job)
        except BaseException:
            self._resources.close()
            raise

    def note(
        self,
        sources: Iterable[str],
        parameters: Iterable[str],
        loading_info: "LoadStateDictInfo | None",
    ) -> None:
        """Record which parameters were made from pruned tensors.

        Args:
            sources: Names of the tensors that they were made from.
            parameters: Their names in the model.
            loading_info: What transformers has recorded of the whole loading.
        """
        self._loading_info = loading_info
        if not self._pruned.isdisjoint(sources):
            self.parameters.update(parameters)

    def keep(self, sources: Iterable[str], made: dict[str, Any]) -> None:
        """Pack what a conversion has decoded, and freeze what is packed.

        Args:
            sources: Names of the tensors that parameters were made from.
            made: The parameters by name; changed.
        """
        if self._keeper is None:
            return
        pruned = not self._pruned.isdisjoint(sources)
        for name, value in made.items():
            tensor = value[0] if isinstance(value, list) else value
            if not self.placement.on_disk(name):
                made[name] = self._keeper.freeze(name, tensor, pruned=pruned)

    @property
    def missing(self) -> set[str]:
        """Names of the parameters that nothing in the checkpoint becomes, once it is loaded."""
        return set() if self._loading_info is None else set(self._loading_info.missing_keys)


class FedConverter(WeightConverter):
    """One of the model's own converters, which gets its tensors from a feed.

    Args:
        original: The converter; it is not changed.
        feed: The feed.
    """

    __slots__ = ("feed", "original")

    def __init__(self, original: WeightConverter, feed: Feed) -> None:
        copy_slots(original, self)
        self.original = original
        self.feed = feed

    def __deepcopy__(self, _memo: object) -> Self:
        """One for another parameter; transformers makes one for each tensor of the checkpoint."""
        copy = type(self).__new__(type(self))
        copy_slots(self, copy)
        copy.collected_tensors = defaultdict(list)
        copy.layer_targets = defaultdict(set)
        return copy

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """As the original does; planes match nothing."""
        if not self.feed.offers(source_key):
            return source_key, None
        return super().rename_source_key(source_key)

    def add_tensor(
        self,
        target_key: str,
        source_key: str,
        source_pattern: str,
        future: object,
    ) -> None:
        """Collect the tensor that the feed makes, instead of the one in the file."""
        # A function, not a future: without `pre_quantized` transformers uses no threads of its own.
        plain = cast("Callable[[], torch.Tensor]", future)
        made: Any = self.feed.announce(source_key, target_key, source_pattern, plain)
        super().add_tensor(target_key, source_key, source_pattern, made)

    def convert(
        self,
        layer_name: str,
        model: PreTrainedModel | None = None,
        config: object = None,
        hf_quantizer: object = None,
        loading_info: "LoadStateDictInfo | None" = None,
    ) -> dict[str, torch.Tensor]:
        """As the original does."""
        sources = {name for names in self.layer_targets.values() for name in names}
        made: dict[str, Any] = super().convert(
            layer_name, model, config, hf_quantizer, loading_info
        )
        self.feed.note(sources, made, loading_info)
        self.feed.keep(sources, made)
        if loading_info is not None:
            self._report_misfits(made, loading_info)
        # transformers would read a tied parameter on the disk from the file, which may be packed
        for name, source in self.feed.placement.tied_on_disk().items():
            if source in made:
                made[name] = made[source]
        return made

    def _report_misfits(self, made: dict[str, Any], loading_info: "LoadStateDictInfo") -> None:
        """Remove tensors of another shape than their parameter's, as transformers does.

        With a quantizer, transformers 5.17 sets parameters without comparing shapes.
        """
        for name, value in list(made.items()):
            shape = (value[0] if isinstance(value, list) else value).shape
            expected = self.feed.placement.shapes.get(name, shape)
            if shape != expected:
                del made[name]
                loading_info.missing_keys.discard(name)
                loading_info.mismatched_keys.add((name, shape, expected))


class FedPlainWeights(FedConverter):
    """Takes every tensor that no converter of the model matches, unchanged.

    A converter, not a renaming: of weights that are only renamed and offloaded to the disk,
    transformers assumes that the checkpoint's file holds them, and would read the packed bytes.

    Args:
        feed: The feed.
    """

    __slots__ = ()

    def __init__(self, feed: Feed) -> None:
        super().__init__(WeightConverter(ANYTHING, ANYTHING, [AsItIs()]), feed)

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        """Match every tensor that the feed wants to give."""
        if not self.feed.wants(source_key):
            return source_key, None
        self._was_used = True
        return source_key, ANYTHING


class AsItIs(ConversionOps):
    """The conversion that changes nothing."""

    def convert(
        self,
        input_dict: dict[str, Any],
        *_: object,
        full_layer_name: str = "",  # transformers always gives it
        **__: object,
    ) -> dict[str, Any]:
        """The tensor itself, under the parameter's name."""
        (tensors,) = input_dict.values()
        return {full_layer_name: tensors[0]}

    @property
    def reverse_op(self) -> ConversionOps:
        """Itself."""
        return self


def copy_slots(source: WeightTransform, target: WeightTransform) -> None:
    """Copy all attributes of one of transformers' transforms to another one."""
    for kind in type(source).__mro__:
        for slot in getattr(kind, "__slots__", ()):
            if hasattr(source, slot):
                object.__setattr__(target, slot, getattr(source, slot))
