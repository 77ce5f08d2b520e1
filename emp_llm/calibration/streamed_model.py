"""A model on the meta device whose units are loaded from the checkpoint and freed again.

A **unit** is what is loaded at a time: a decoder block, or a module outside of all decoder blocks
that holds targets. What a tensor of the checkpoint becomes in the model, merged, split or renamed,
is left to transformers: each unit is loaded by the function with which `from_pretrained` loads a
whole model. Weights that are tied to those of another unit are *borrowed* from it: they are loaded
from its tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import set_module_tensor_to_device
from transformers import conversion_mapping, core_model_loading
from transformers.modeling_utils import LoadStateDictConfig

from emp_llm.calibration.freed_memory import give_back
from emp_llm.calibration.parameter_map import ParameterMap
from emp_llm.calibration.tensor_loading import LazyTensor, TensorLoader, compute_dtype
from emp_llm.errors import CheckpointError
from emp_llm.runtime.quiet import calm, transformers_without_bars
from emp_llm.structure.meta_model import build_meta_model
from emp_llm.structure.places import find_places

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from torch import nn
    from transformers import PreTrainedModel

    from emp_llm.calibration.parameter_map import ParameterMatrix
    from emp_llm.calibration.tensor_loading import Change
    from emp_llm.checkpoint.checkpoint import Checkpoint
    from emp_llm.checkpoint.open_files import OpenFiles

__all__ = ["StreamedModel", "Weights"]

_NO_MODULE = "emp-llm: nothing"

Weights = dict[str, "nn.Parameter"]
"""Parameters of the model, by name."""


class StreamedModel:
    """The model of a checkpoint, of which some units are in memory.

    Outside of units, embeddings, the output head and what is tied to them are loaded temporarily,
    when the model calls them; everything else there is small, and always loaded.

    Args:
        checkpoint: The checkpoint.
        files: Its files.
        device: Where weights are put.
        targets: Names of the tensors that are pruned.
        dtype: What the model computes in; by default that of the checkpoint.

    Attributes:
        device: Where weights are put.
        dtype: What the model computes in.
        model: The model itself, in evaluation mode.
        map: Which parameters the checkpoint's tensors become.
        units: Of each unit, by the name of its module, the names of its tensors in the checkpoint.

    Raises:
        CheckpointError: If the model cannot be built from the config.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        files: OpenFiles,
        device: torch.device,
        targets: Iterable[str],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.device = device
        self.dtype = dtype or compute_dtype(checkpoint)
        self._checkpoint = checkpoint
        self._loader = TensorLoader(checkpoint, files)
        shapes = {name: entry.shape for name, (_, entry) in checkpoint.tensors.items()}
        with calm():
            self.model = self._build(len(shapes))
            self.map = ParameterMap(self.model, shapes)
        # the parameters on the meta device, which take the place of weights that are released
        self._meta = dict(self.model.named_parameters(remove_duplicate=False))
        self._tensors_at: dict[str, list[str]] = {}
        for name, where in self.map.landings.items():
            self._tensors_at.setdefault(where.name, []).append(name)
        self._tied = self._find_tied()
        self.units = self._find_units(set(targets))
        self._unit_of_tensor = {name: unit for unit, names in self.units.items() for name in names}
        self._borrowed = {unit: self._find_borrowed(unit) for unit in self.units}
        self._temporary: set[str] = set()
        self._load_outside()

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

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the checkpoint, as it was changed for the unit that was loaded last.

        Raises:
            CheckpointError: If it cannot be read.
        """
        return self._loader.read(name)

    def load(self, unit: str, change: Change) -> None:
        """Put the weights of a unit in their place.

        Args:
            unit: The unit.
            change: Applied to each tensor that is read, until the next unit is loaded.

        Raises:
            CheckpointError: If they cannot be read, or some are missing.
        """
        self._loader.change = change
        self._load(self.units[unit])
        borrowed = self._borrowed[unit]
        sources = set(borrowed.values())
        self._load(tensor for source in sorted(sources) for tensor in self._tensors_at[source])
        for name, source in borrowed.items():
            self._set(name, self.model.get_parameter(source))
        for source in sources:  # only this unit is loaded
            self._set(source, self._meta[source])
        for name, parameter in self.module(unit).named_parameters(prefix=unit):
            if parameter.is_meta:
                self._tie(name)

    def load_whole(self, change: Change, only: Collection[str] | None = None) -> None:
        """Put the weights of all units, and of what lies outside of them, in their place to stay.

        Args:
            change: Applied to each tensor that is read.
            only: Parameters to load again, of a model that is loaded; None for all.

        Raises:
            CheckpointError: If they cannot be read, or some are missing.
        """
        self._loader.change = change
        self._load(
            name
            for name, where in self.map.landings.items()
            if only is None or not {where.name, *where.others}.isdisjoint(only)
        )
        for name in self._meta:
            if name in self._tied or self.model.get_parameter(name).is_meta:
                self._tie(name)

    def parameters(self, unit: str) -> Weights:
        """The weights of a unit that is loaded."""
        return dict(self.module(unit).named_parameters(prefix=unit))

    def unit_of(self, tensor: str) -> str | None:
        """The unit that loads a tensor of the checkpoint; None outside of units."""
        return self._unit_of_tensor.get(tensor)

    def multiplied_units(self, unit: str) -> list[str]:
        """The units whose weights a unit multiplies by: those that it borrows from, and itself."""
        lenders = {self._unit_holding(source): None for source in self._borrowed[unit].values()}
        return [*(lender for lender in lenders if lender is not None), unit]

    def multiplied(self, unit: str) -> Weights:
        """The weights of a unit that is loaded; those that it borrows by their lender's names."""
        borrowed = self._borrowed[unit]
        return {borrowed.get(name, name): weight for name, weight in self.parameters(unit).items()}

    def place(self, weights: Weights) -> None:
        """Put weights back that `parameters` returned."""
        for name, parameter in weights.items():
            self._set(name, parameter)

    def release(self, unit: str) -> None:
        """Release the weights of a unit."""
        for name in self._meta:
            if name.startswith(f"{unit}."):
                self._set(name, self._meta[name])
        give_back()

    def release_all(self) -> None:
        """Release the weights of all units, and those that are loaded temporarily."""
        for unit in self.units:
            self.release(unit)
        self.release_temporary()

    def load_embeddings(self) -> None:
        """Load the embeddings ahead: models ask for their device before they call them."""
        for module in self._embeddings:
            self._load_temporary(module)

    def release_temporary(self) -> None:
        """Release the weights that are loaded temporarily, until they are called again."""
        for name in self._temporary:
            self._set(name, self._meta[name])
        self._temporary.clear()

    def matrices(
        self, unit: str, targets: Collection[str]
    ) -> dict[tuple[str, int], list[ParameterMatrix]]:
        """Which matrices of parameters each matrix of a target becomes, or becomes part of.

        Args:
            unit: The targets' unit.
            targets: Names of tensors in the checkpoint.

        Returns:
            By tensor, and number of the matrix in it; several where loading splits the matrix.

        Raises:
            CheckpointError: If transformers cannot say which parameters a tensor becomes.
        """
        inside = {name: self._meta[name] for name in self._meta if name.startswith(f"{unit}.")}
        return self.map.matrices(inside, targets)

    def _build(self, tensors: int) -> PreTrainedModel:
        checkpoint = self._checkpoint
        before = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)  # of buffers that the model makes by itself
        try:
            model = build_meta_model(
                checkpoint.folder,
                tensors,
                checkpoint.config,
                runs=True,
            )
        finally:
            torch.set_default_dtype(before)
        model.train(mode=False)
        model.requires_grad_(requires_grad=False)
        # buffers that no checkpoint holds, such as rotary frequencies, are made by the model itself
        for name, buffer in model.named_non_persistent_buffers():
            value = torch.empty_like(buffer, device=self.device)
            set_module_tensor_to_device(model, name, self.device, value=value)
        initialize: Callable[[], None] = model.initialize_weights
        initialize()
        return model

    def _find_units(self, targets: set[str]) -> dict[str, list[str]]:
        units: dict[str, list[str]] = {}
        for name, where in self.map.landings.items():
            unit = where.place.block or (self.map.module_of(name) if name in targets else None)
            if unit is not None:
                units.setdefault(unit, []).append(name)
        # a decoder block may have no tensor of its own, as of a decoder that is tied to an encoder
        places = find_places(self.model) if self._tied else {}
        for name in self._tied:
            if (block := places[name].block) is not None:
                units.setdefault(block, [])
        return units

    def _find_tied(self) -> dict[str, str]:
        """For each parameter that is tied and has no tensor: the one that it is tied to and has."""
        tied: dict[str, str] = dict(getattr(self.model, "all_tied_weights_keys", {}))
        groups: dict[str, list[str]] = {}
        for name, source in tied.items():
            while source in tied:
                source = tied[source]
            groups.setdefault(source, [source]).append(name)
        # as in `from_pretrained`, any of them may be the one that the checkpoint holds
        return {
            name: next((one for one in group if one in self._tensors_at), group[0])
            for group in groups.values()
            for name in group
            if name not in self._tensors_at and name in self._meta
        }

    def _find_borrowed(self, unit: str) -> dict[str, str]:
        """The parameters of a unit that are tied to those of other units, and these."""
        return {
            name: source
            for name, source in self._tied.items()
            if name.startswith(f"{unit}.")
            and source in self._tensors_at
            and self._unit_holding(source) not in (None, unit)
        }

    def _unit_holding(self, parameter: str) -> str | None:
        """The unit that a parameter is in."""
        return next((unit for unit in self.units if parameter.startswith(f"{unit}.")), None)

    def _load_outside(self) -> None:
        """Load what lies outside of units: small weights now, others when the model calls them."""
        inside = tuple(f"{unit}." for unit in self.units)
        self._own: dict[str, list[str]] = {}
        for name in self._meta:
            if not name.startswith(inside):
                self._own.setdefault(name.rpartition(".")[0], []).append(name)
        self._tensors_of: dict[str, list[str]] = {}
        kinds: dict[str, str | None] = {}
        for name, where in self.map.landings.items():
            if not where.name.startswith(inside):
                module = self.map.module_of(name)
                self._tensors_of.setdefault(module, []).append(name)
                kinds[module] = where.place.why_not
        self._embeddings = [module for module, kind in kinds.items() if kind == "embedding"]
        temporary = {module for module, kind in kinds.items() if kind in ("embedding", "lm_head")}
        temporary |= {name.rpartition(".")[0] for name in self._tied if not name.startswith(inside)}
        self._load(
            name
            for module, names in self._tensors_of.items()
            if module not in temporary
            for name in names
        )
        # a hook on every module: what is called, and when, only the model's own code knows
        for module in self._own:
            self.model.get_submodule(module).register_forward_pre_hook(
                lambda _module, _inputs, name=module: self._load_temporary(name)
            )

    def _load_temporary(self, module: str) -> None:
        """Load the own parameters of a module outside of units, unless they are loaded."""
        for name in self._own[module]:
            if not self.model.get_parameter(name).is_meta:
                continue
            self._temporary.add(name)
            if name not in self._tied:
                self._load(self._tensors_of.get(module, ()))
            if self.model.get_parameter(name).is_meta:
                self._tie(name)

    def _tie(self, name: str) -> None:
        """Have a parameter share what it is tied to, which is loaded if need be."""
        source = self._tied.get(name)
        if source is None or source not in self._tensors_at:
            raise CheckpointError(
                f"{self._checkpoint.folder}: has no weights for {name!r}, which the model needs: "
                "give a checkpoint with all of its weights"
            )
        if self.model.get_parameter(source).is_meta:
            self._temporary.add(source)
            self._load(self._tensors_at[source])
        self._set(name, self.model.get_parameter(source))

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        module, _, own = name.rpartition(".")
        self.model.get_submodule(module)._parameters[own] = parameter

    def _load(self, names: Iterable[str]) -> None:
        state = {name: LazyTensor(self._loader, name) for name in names}
        if not state:
            return
        # some models keep certain weights in float32, whatever they compute in
        plan = self.model._get_dtype_plan(self.dtype)
        mapping: Any = conversion_mapping.get_model_conversion_mapping(self.model)
        config = LoadStateDictConfig(
            # a module that is "on disk" keeps transformers from reading all tensors at once
            device_map={"": self.device, _NO_MODULE: "disk"},
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
            parameter = self.model.get_parameter_or_buffer(self.map.landings[name].name)
            parameter.requires_grad_(requires_grad=False)
