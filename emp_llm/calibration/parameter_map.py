"""Which parameters of a model the checkpoint's tensors become, and the way back.

transformers may merge, split or rename tensors when it loads them. `land` says which parameter a
tensor becomes part of; for everything else its own conversion is run backwards, on labels or values
in the parameters' place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import core_model_loading

from emp_llm.runtime.quiet import calm
from emp_llm.structure.landing import land

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["ParameterMap", "ParameterMatrix"]

ParameterMatrix = tuple[str, int]
"""A parameter of the model, by name, and the number of a matrix in it."""


class ParameterMap:
    """The tensors of a checkpoint and the parameters of its model.

    Args:
        model: The model, on any device.
        shapes: The checkpoint's tensors, name to shape.

    Attributes:
        landings: Where each tensor goes; those that the model has no place for are left out.
    """

    def __init__(self, model: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._model = model
        landings = land(model, shapes)
        self.landings = {name: where for name, where in landings.items() if where is not None}

    def module_of(self, tensor: str) -> str:
        """The name of the module whose own parameter a tensor becomes."""
        return self.landings[tensor].name.rpartition(".")[0]

    def matrices(
        self, parameters: Mapping[str, nn.Parameter], targets: Iterable[str]
    ) -> dict[tuple[str, int], ParameterMatrix]:
        """Which matrix of which parameter each matrix of a target becomes, or becomes part of.

        Args:
            parameters: The parameters of the targets' unit, by name, all loaded.
            targets: Names of tensors in the checkpoint.

        Returns:
            By tensor, and number of the matrix in it.
        """
        labels: dict[str, torch.Tensor] = {}
        labelled: list[ParameterMatrix] = []
        for name, parameter in parameters.items():
            if parameter.ndim not in (2, 3):
                continue
            count = len(parameter) if parameter.ndim == 3 else 1
            # every weight of a matrix is labelled with the matrix's number, and takes no memory
            first = len(labelled)
            numbers = torch.arange(first, first + count, dtype=torch.int32)
            labels[name] = numbers.view(-1, *[1] * (parameter.ndim - 1)).expand(parameter.shape)
            labelled += [(name, matrix) for matrix in range(count)]
        by_tensor = self._reverted(labels)
        return {
            (target, matrix): labelled[int(label[0, 0])]
            for target in targets
            for matrix, label in enumerate(
                by_tensor[target].reshape(-1, *by_tensor[target].shape[-2:])
            )
        }

    def to_checkpoint(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Values of a loaded unit's parameters, such as gradients, as the checkpoint's tensors."""
        found = self._reverted(values)
        return {name: found[name] for name in self.landings if name in found}

    def bias_of(self, target: str) -> str | None:
        """The tensor that becomes, as it is, the bias of a target's layer; None without one."""
        bias = f"{self.module_of(target)}.bias"
        landings = self.landings.items()
        return next((name for name, other in landings if other.name == bias and other.whole), None)

    def _reverted(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Values of parameters by the names of tensors, with the model's prefix and without.

        Checkpoints of a base model have no prefix where the model has one, and the other way round.
        A name that a tensor has by itself goes before one that it gets this way.
        """
        with calm():
            found: dict[str, torch.Tensor] = core_model_loading.revert_weight_conversion(
                self._model, dict(values)
            )
        prefix = f"{self._model.base_model_prefix}."
        aliases: dict[str, torch.Tensor] = {}
        for name, value in found.items():
            aliases.setdefault(prefix + name, value)
            aliases.setdefault(name.removeprefix(prefix), value)
        return aliases | found
