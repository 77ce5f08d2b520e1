"""Which parameters of a model the checkpoint's tensors become, and the way back.

transformers may merge, split or rename tensors when it loads them. `land` says which parameter a
tensor becomes part of; for everything else its own conversion is run backwards, on labels or values
in the parameters' place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import transformers
from transformers import conversion_mapping, core_model_loading

from emp_llm.errors import CheckpointError
from emp_llm.runtime.quiet import calm
from emp_llm.structure.landing import land

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

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
        conversions = conversion_mapping.get_model_conversion_mapping(model)
        landings = land(model, shapes, conversions)
        # what `revert_weight_conversion` goes by; loading a part of the model leaves out the rest
        self._conversions = [one for one in conversions if one.was_used()]
        self.landings = {name: where for name, where in landings.items() if where is not None}

    def module_of(self, tensor: str) -> str:
        """The name of the module whose own parameter a tensor becomes."""
        return self.landings[tensor].name.rpartition(".")[0]

    def matrices(
        self, parameters: Mapping[str, nn.Parameter], targets: Collection[str]
    ) -> dict[tuple[str, int], list[ParameterMatrix]]:
        """Which matrices of parameters each matrix of a target becomes, or becomes part of.

        Args:
            parameters: The parameters of the targets' unit, by name, on any device.
            targets: Names of tensors in the checkpoint.

        Returns:
            By tensor, and number of the matrix in it; several where loading splits the matrix.

        Raises:
            CheckpointError: If transformers cannot say which parameters a tensor becomes.
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
        by_tensor = self.to_checkpoint(labels, targets)
        return {
            (target, matrix): [labelled[number] for number in _numbers(label)]
            for target, stack in by_tensor.items()
            for matrix, label in enumerate(stack.reshape(-1, *stack.shape[-2:]))
        }

    def to_checkpoint(
        self, values: Mapping[str, torch.Tensor], tensors: Collection[str]
    ) -> dict[str, torch.Tensor]:
        """Values of a unit's parameters, such as gradients, as the checkpoint's tensors.

        Args:
            values: Values by the parameters' names; all those that the tensors become.
            tensors: Names of tensors in the checkpoint.

        Raises:
            CheckpointError: If transformers cannot say which parameters a tensor becomes.
        """
        found = self._reverted(values)
        # a tensor that is only renamed needs no way back, and old names have none
        found |= {
            name: values[where.name]
            for name in tensors
            if (where := self.landings[name]).whole and where.name in values
        }
        for name in tensors:
            if name not in found:
                raise CheckpointError(
                    f"{name!r}: loading makes {self.landings[name].name!r} of it in a way that "
                    f"transformers {transformers.__version__} cannot revert, so no statistics can "
                    "be gathered for it: leave it out with --ignore, or choose a criterion that "
                    "needs no data, such as magnitude"
                )
        return {name: found[name] for name in tensors}

    def bias_of(self, target: str, rows: int) -> str | None:
        """The tensor that becomes, as it is, the bias of a target's layer; None without one.

        Args:
            target: The target, one matrix.
            rows: Its rows. A bias of other length belongs to a part of it, or to more than it.
        """
        bias = f"{self.module_of(target)}.bias"
        found = (name for name, where in self.landings.items() if where.name == bias)
        name = next(found, None)
        where = self.landings.get(name or "")
        return name if where is not None and where.whole and where.place.shape == (rows,) else None

    def _reverted(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Values of parameters by the names of tensors, with the model's prefix and without.

        Checkpoints of a base model have no prefix where the model has one, and the other way round.
        A name that a tensor has by itself goes before one that it gets this way.
        """
        vars(self._model)["_weight_conversions"] = self._conversions
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


def _numbers(label_RC: torch.Tensor) -> list[int]:
    """The labels in a matrix, which conversions put together by whole rows or columns."""
    edges = torch.cat([label_RC[:, 0], label_RC[0]])
    return list(dict.fromkeys(edges.tolist()))
