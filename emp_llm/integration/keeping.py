"""What keeps weights packed while a model is loaded, and what frees them again."""

import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from emp_kernels.held_dispatch import has_fast_products
from torch import nn
from transformers import PreTrainedModel

from emp_llm.resident.content import Content
from emp_llm.resident.dense_weights import NUMBER_FORMATS
from emp_llm.resident.held_planes import HeldPlanes
from emp_llm.resident.packing import PackedBefore, pack_rest, pack_tensor
from emp_llm.resident.weight import PackedWeight
from emp_llm.structure.places import find_places

__all__ = ["Keeper", "packed_parameters", "unpack_parameters"]


class Keeper:
    """Packs the weights of a model as they are loaded.

    Args:
        model: The model, on the meta device.
        tensors: How the checkpoint's tensors lie that are pruned, by name.
        packs_rest: Whether other tensors are packed too, without loss; those of a checkpoint that
            is packed already stay as they are in it.
    """

    def __init__(
        self, model: PreTrainedModel, tensors: Mapping[str, PackedBefore], *, packs_rest: bool
    ) -> None:
        self._tensors = tensors
        self._packs_rest = packs_rest
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        self._places = find_places(model)

    def pack(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the checkpoint, packed if it is to be.

        Args:
            name: Its name in the checkpoint.
            tensor: The tensor, pruned if it is a target.
        """
        return self._packed(name, tensor, self._tensors.get(name))

    def freeze(self, name: str, tensor: torch.Tensor, *, pruned: bool) -> torch.Tensor:
        """What a parameter is set to.

        Args:
            name: Its name in the model.
            tensor: What it was made from the checkpoint's tensors; decoded if packed rows could
                not be put together so.
            pruned: Whether one of these was pruned.
        """
        if name not in self._parameters:  # a buffer
            return tensor.unpacked() if isinstance(tensor, PackedWeight) else tensor
        place = self._places.get(name)
        lies = PackedBefore(place.transposed) if pruned and place is not None else None
        tensor = self._packed(name, tensor, lies)
        if isinstance(tensor, PackedWeight):
            if tensor.is_cpu:
                _warn_if_slow(tensor.dtype)
            return nn.Parameter(tensor, requires_grad=False)
        return tensor

    def _packed(self, name: str, tensor: torch.Tensor, lies: PackedBefore | None) -> torch.Tensor:
        if isinstance(tensor, PackedWeight) or tensor.dtype not in NUMBER_FORMATS:
            return tensor
        planes: HeldPlanes | None = None
        if lies is not None:
            planes = pack_tensor(name, tensor, lies)
        elif self._packs_rest:
            planes = pack_rest(tensor)
        return tensor if planes is None else PackedWeight(Content.of(planes)).to(tensor.device)


@cache
def _warn_if_slow(dtype: torch.dtype) -> None:
    """Say once, for each dtype, if this CPU lacks the instructions for fast products."""
    if has_fast_products(NUMBER_FORMATS[dtype]):
        return
    needed = "AVX-512 BF16" if dtype == torch.bfloat16 else "AVX-512 VBMI2"
    warnings.warn(
        f"this CPU has no {needed}: weights that stay packed in memory save memory here, but the "
        "model is slower than a dense one; load it without keep_packed where speed matters more",
        stacklevel=2,
    )


def packed_parameters(model: nn.Module) -> dict[str, PackedWeight]:
    """The parameters of a model that stay packed in memory, by name; tied ones once."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if isinstance(parameter, PackedWeight)
    }


def unpack_parameters(model: nn.Module) -> None:
    """Put dense parameters, which can be trained, in place of packed ones; tied ones stay tied."""
    dense: dict[int, nn.Parameter] = {}
    for module in model.modules():
        parameters: dict[str, Any] = module._parameters
        for name, parameter in parameters.items():
            if isinstance(parameter, PackedWeight):
                if id(parameter) not in dense:
                    dense[id(parameter)] = nn.Parameter(parameter.unpacked())
                parameters[name] = dense[id(parameter)]
