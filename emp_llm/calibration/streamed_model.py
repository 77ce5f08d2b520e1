"""A model on the meta device whose parts get their weights from the checkpoint and lose them again.

What a tensor of the checkpoint becomes in the model, merged, split or renamed, is transformers' own
business: each part is loaded by the function that `from_pretrained` loads a whole model by.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_module_tensor_to_device
from torch import nn
from transformers import conversion_mapping, core_model_loading
from transformers.modeling_utils import LoadStateDictConfig

from emp_llm.calibration.freed_memory import give_back
from emp_llm.errors import CheckpointError
from emp_llm.runtime.quiet import calm, transformers_without_bars
from emp_llm.structure.landing import land
from emp_llm.structure.meta_model import build_meta_model

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from transformers import PreTrainedModel

    from emp_llm.checkpoint.checkpoint import Checkpoint
    from emp_llm.checkpoint.header import TensorEntry
    from emp_llm.checkpoint.open_files import OpenFiles

__all__ = ["Fed", "StreamedModel", "Weights"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_FLOATS = ("BF16", "F16", "F32", "F64")
_NOWHERE = "emp-llm: nothing"

Fed = tuple[str, int]
"""A parameter of the model, and which matrix of it."""

Weights = dict[str, nn.Parameter]
"""Parameters of the model, by name."""


class StreamedModel:
    """The model of a checkpoint, of which parts are in memory.

    Args:
        checkpoint: The checkpoint.
        files: Its files.
        device: Where parts are put.
        change: Given each tensor that is read, by its name, and returns what to load in its place.

    Attributes:
        model: It, in evaluation mode.
        units: The parts that are loaded one at a time, by the name of their module: blocks, and
            modules outside of blocks that hold targets. Of each the names of its tensors in the
            checkpoint.

    Raises:
        CheckpointError: If the config does not tell the model's structure.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        files: OpenFiles,
        device: torch.device,
        targets: Iterable[str],
        change: Callable[[str, torch.Tensor], torch.Tensor] = lambda _name, tensor: tensor,
    ) -> None:
        self.device = device
        self._checkpoint = checkpoint
        self._files = files
        self._change = change
        self.dtype = _dtype(checkpoint)
        shapes = {name: entry.shape for name, (_, entry) in checkpoint.tensors.items()}
        with calm():
            self.model = self._build(len(shapes))
            landings = land(self.model, shapes)
        self._landings = {name: where for name, where in landings.items() if where is not None}
        self._meta = dict(self.model.named_parameters(remove_duplicate=False))
        self._tied = dict(getattr(self.model, "all_tied_weights_keys", {}))
        self.units = self._find_units(set(targets))
        self._visitors: set[str] = set()
        self._hook_others()

    def module(self, unit: str) -> nn.Module:
        """The module of a unit."""
        return self.model.get_submodule(unit)

    @property
    def outside(self) -> list[nn.Module]:
        """The modules that are in no unit."""
        inside = tuple(f"{unit}." for unit in self.units)
        return [
            module
            for name, module in self.model.named_modules()
            if name not in self.units and not name.startswith(inside)
        ]

    def load(self, unit: str) -> None:
        """Put the weights of a unit in their place.

        Raises:
            CheckpointError: If they cannot be read, or some are missing.
        """
        self._load(self.units[unit])
        for name, parameter in self.module(unit).named_parameters(prefix=unit):
            if parameter.is_meta:
                self._tie(name)

    def parameters(self, unit: str) -> Weights:
        """The weights of a unit that is loaded."""
        return dict(self.module(unit).named_parameters(prefix=unit))

    def place(self, weights: Weights) -> None:
        """Put weights in their place that were there before."""
        for name, parameter in weights.items():
            self._set(name, parameter)

    def release(self, unit: str) -> None:
        """Take the weights of a unit away."""
        for name in self._meta:
            if name.startswith(f"{unit}."):
                self._set(name, self._meta[name])
        give_back()

    def release_all(self) -> None:
        """Take away the weights of all units, and what is needed between them only now and then."""
        for unit in self.units:
            self.release(unit)
        self.release_others()

    def load_embeddings(self) -> None:
        """Put embeddings in their place: models ask where they lie before they call them."""
        for where in self._embeddings:
            self._load_own(where)

    def release_others(self) -> None:
        """Take away embeddings and output heads, until they are needed again."""
        for name in self._visitors:
            self._set(name, self._meta[name])
        self._visitors.clear()

    def feeds(self, unit: str, targets: Iterable[str]) -> dict[tuple[str, int], Fed]:
        """Which matrix of which parameter each matrix of a target becomes, or becomes part of.

        To be called while the unit is loaded.

        Args:
            unit: The unit.
            targets: Names of tensors in the checkpoint.

        Returns:
            By tensor and number of the matrix in it.
        """
        module = self.module(unit)
        parameters = {
            f"{unit}.{name}": parameter
            for name, parameter in module.named_parameters()
            if parameter.ndim in (2, 3)
        }
        labels, fed, first = {}, {}, 0
        for name, parameter in parameters.items():
            count = len(parameter) if parameter.ndim == 3 else 1
            numbers = torch.arange(first, first + count, dtype=torch.int32)
            labels[name] = numbers.view(-1, *[1] * (parameter.ndim - 1)).expand(parameter.shape)
            fed.update({first + i: (name, i) for i in range(count)})
            first += count
        by_name = self._reverted(labels)
        feeds = {}
        for target in targets:
            label = by_name[target]
            for matrix, part in enumerate(label.reshape(-1, *label.shape[-2:])):
                feeds[target, matrix] = fed[int(part[0, 0])]
        return feeds

    def to_checkpoint(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What belongs to parameters of a loaded unit, as the checkpoint would hold it."""
        found = self._reverted(values)
        return {name: found[name] for name in self._landings if name in found}

    def _reverted(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What belongs to parameters, by the names of tensors, with the model's prefix or without.

        Of two that would have one name, the one whose own name it is has it.
        """
        with calm():
            found: dict[str, torch.Tensor] = core_model_loading.revert_weight_conversion(
                self.model, dict(values)
            )
        prefix = f"{self.model.base_model_prefix}."
        aliases: dict[str, torch.Tensor] = {}
        for name, value in found.items():
            aliases.setdefault(prefix + name, value)
            aliases.setdefault(name.removeprefix(prefix), value)
        return aliases | found

    def bias_of(self, target: str) -> str | None:
        """The tensor of the checkpoint with the biases of a target's layer, if it is one as is."""
        where = self._landings[target]
        stem, _, _ = where.name.rpartition(".")
        return next(
            (
                name
                for name, other in self._landings.items()
                if other.name == f"{stem}.bias" and other.whole
            ),
            None,
        )

    def _build(self, tensors: int) -> PreTrainedModel:
        checkpoint = self._checkpoint
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            model = build_meta_model(
                checkpoint.folder,
                tensors,
                checkpoint.config if checkpoint.original else None,
                runs=True,
            )
        finally:
            torch.set_default_dtype(before)
        model.train(mode=False)
        model.requires_grad_(requires_grad=False)
        # buffers that no checkpoint holds are made by the model itself
        for name, buffer in model.named_non_persistent_buffers():
            value = torch.empty_like(buffer, device=self.device)
            set_module_tensor_to_device(model, name, self.device, value=value)
        model.initialize_weights()  # type: ignore[no-untyped-call]
        return model

    def _find_units(self, targets: set[str]) -> dict[str, list[str]]:
        units: dict[str, list[str]] = {}
        for name, where in self._landings.items():
            outside = where.name.rpartition(".")[0] if name in targets else None
            unit = where.place.block or outside
            if unit is not None:
                units.setdefault(unit, []).append(name)
        return units

    def _hook_others(self) -> None:
        """Load what lies outside the units: big matrices when they are called, the rest now."""
        inside = tuple(f"{unit}." for unit in self.units)
        own: dict[str, list[str]] = {}
        for name in self._meta:
            if not name.startswith(inside):
                own.setdefault(name.rpartition(".")[0], []).append(name)
        others = [n for n, where in self._landings.items() if not where.name.startswith(inside)]
        tensors: dict[str, list[str]] = {}
        for name in others:
            tensors.setdefault(self._landings[name].name.rpartition(".")[0], []).append(name)
        kinds = {
            self._landings[name].name.rpartition(".")[0]: self._landings[name].place.why_not
            for name in others
        }
        self._embeddings = [where for where, kind in kinds.items() if kind == "embedding"]
        visiting = {where for where, kind in kinds.items() if kind in ("embedding", "lm_head")}
        visiting |= {name.rpartition(".")[0] for name in self._tied if not name.startswith(inside)}
        self._load(
            name for where, names in tensors.items() if where not in visiting for name in names
        )
        self._own, self._others = own, tensors
        for where in own:
            self.model.get_submodule(where).register_forward_pre_hook(
                lambda _module, _inputs, where=where: self._load_own(where)
            )

    def _load_own(self, where: str) -> None:
        for name in self._own[where]:
            if self.model.get_parameter(name).is_meta:
                self._visitors.add(name)
                self._load_one(name, self._others.get(where, ()))

    def _load_one(self, name: str, tensors: Iterable[str]) -> None:
        if name not in self._tied:
            self._load(tensors)
        if self.model.get_parameter(name).is_meta:
            self._tie(name)

    def _tie(self, name: str) -> None:
        """Let a parameter share what it is tied to."""
        source = self._tied.get(name)
        if source is None:
            raise CheckpointError(
                f"{self._checkpoint.folder}: has no weights for {name!r}, which the model needs: "
                "give a checkpoint with all of its weights"
            )
        parameter = self.model.get_parameter(source)
        if parameter.is_meta:
            self._visitors.add(source)
            self._load(n for n, where in self._landings.items() if where.name == source)
            parameter = self.model.get_parameter(source)
        if parameter.is_meta:
            self._tie(source)
            parameter = self.model.get_parameter(source)
        self._set(name, parameter)

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        module, _, own = name.rpartition(".")
        self.model.get_submodule(module)._parameters[own] = parameter

    def _load(self, names: Iterable[str]) -> None:
        state = {name: _Unread(self, name) for name in names}
        if not state:
            return
        plan = self.model._get_dtype_plan(self.dtype)
        mapping: Any = conversion_mapping.get_model_conversion_mapping(self.model)
        config = LoadStateDictConfig(
            # a module that is "on disk" keeps transformers from reading all tensors at once
            device_map={"": self.device, _NOWHERE: "disk"},
            dtype=self.dtype,
            dtype_plan=plan,
            weight_mapping=mapping,
        )
        with calm(), transformers_without_bars():
            info, _ = core_model_loading.convert_and_load_state_dict_in_model(
                model=self.model, state_dict=state, load_config=config
            )
        faults = [*info.conversion_errors.values(), *map(str, info.mismatched_keys)]
        if faults:
            raise CheckpointError(
                f"{self._checkpoint.folder}: transformers cannot make the model's weights of the "
                f"checkpoint's: {faults[0]}"
            )
        for name in state:
            self._freeze(self._landings[name].name)

    def _freeze(self, name: str) -> None:
        parameter = self.model.get_parameter_or_buffer(name)
        parameter.requires_grad_(requires_grad=False)

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint, as it is to be loaded.

        Raises:
            CheckpointError: If it cannot be read.
        """
        shard, entry = self._checkpoint.tensors[name]
        tensor = torch.empty(entry.shape, dtype=_torch_dtype(name, entry))
        if tensor.numel():
            data = tensor.view(-1).view(torch.uint8).numpy()
            self._files.file(shard).read_into(entry.start, data.data)
        return self._change(name, tensor)


class _Unread:
    """A tensor of the checkpoint that is read when transformers asks for it, as it slices it."""

    def __init__(self, model: StreamedModel, name: str) -> None:
        self._model = model
        self._name = name

    def __getitem__(self, _everything: object) -> torch.Tensor:
        return self._model.read(self._name)


def _torch_dtype(name: str, entry: TensorEntry) -> torch.dtype:
    dtype = _DTYPES.get(entry.dtype)
    if dtype is None:
        raise CheckpointError(
            f"{name!r} is {entry.dtype}, which no calibration can compute with: load a dequantized "
            "checkpoint"
        )
    return dtype


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    """What the model computes in: as its config says, else as its first float weights are."""
    text = checkpoint.config.get("text_config")
    told = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))
    if told is None and isinstance(text, dict):
        told = text.get("dtype", text.get("torch_dtype"))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        if str(dtype) == f"torch.{told}":
            return dtype
    stored = (entry.dtype for _, entry in checkpoint.tensors.values())
    return _DTYPES[next((name for name in stored if name in _FLOATS), "F32")]
