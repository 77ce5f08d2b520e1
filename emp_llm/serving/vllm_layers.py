"""Layers of vLLM whose weights stay packed in memory, where their rows were not cut apart."""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.utils import set_weight_attrs

from emp_llm.resident.weight import PackedWeight
from emp_llm.serving.gathered_weight import GatheredWeight

__all__ = ["PackedMethod"]


class Layer(Protocol):
    """What is needed of a layer: a matrix, whose rows are outputs or words."""

    weight: Any
    quant_method: QuantizeMethodBase

    def register_parameter(self, name: str, parameter: nn.Parameter) -> None:
        """As torch's."""


class PackedMethod(QuantizeMethodBase):
    """A linear layer, vocabulary or head whose weight stays packed if any part of it is.

    A compiled model holds a call with the layer's name, as for attention, and no weight: what
    vLLM keeps of the compilation is good for the same model packed in another way.

    Args:
        dense: vLLM's method for such a layer if it turns out to be dense.
        layers: The layers that calls name, as vLLM gives them to a forward pass.
    """

    def __init__(self, dense: QuantizeMethodBase, layers: dict[str, Any]) -> None:
        self._dense = dense
        self._layers = layers
        self._name = ""

    def create_weights(self, layer: Layer, *sizes: object, **more: object) -> None:
        """Give the layer a weight that its loaders fill, the parts of its rows one by one."""
        self._name = f"emp_llm.{len(self._layers)}"
        self._layers[self._name] = layer
        with torch.device("meta"):
            self._dense.create_weights(layer, *sizes, **more)
        meant = layer.weight
        rows, columns = meant.shape
        weight = nn.Parameter(GatheredWeight(rows, columns, meant.dtype), requires_grad=False)
        loader = meant.weight_loader
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0, "weight_loader": loader})
        layer.register_parameter("weight", weight)

    def process_weights_after_loading(self, layer: Layer) -> None:
        """Take what was loaded; a dense layer is left to vLLM."""
        if not isinstance(layer.weight, GatheredWeight):
            return
        layer.weight = nn.Parameter(layer.weight.whole(), requires_grad=False)
        if not isinstance(layer.weight, PackedWeight):
            layer.quant_method = self._dense
            self._dense.process_weights_after_loading(layer)

    def apply(self, layer: Layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply by the packed weight: [..., C] to [..., R]."""
        if not torch.compiler.is_compiling():
            return F.linear(x, layer.weight, bias)
        made: Tensor = _operators.multiply(x, bias, self._name, layer.weight.shape[0])
        return made

    def embedding(self, layer: Layer, ids: Tensor) -> Tensor:
        """Look up packed rows."""
        weight = layer.weight
        if not torch.compiler.is_compiling():
            return F.embedding(ids, weight)
        made: Tensor = _operators.look_up(ids, self._name, weight.shape[1], weight.dtype)
        return made


def _weight_of(layer: str) -> Tensor:
    weight: Tensor = get_forward_context().no_compile_layers[layer].weight
    return weight


def _multiply(x: Tensor, bias: Tensor | None, layer: str, _rows: int) -> Tensor:
    return F.linear(x, _weight_of(layer), bias)


def _multiply_shape(x: Tensor, _bias: Tensor | None, _layer: str, rows: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


def _look_up(ids: Tensor, layer: str, _columns: int, _dtype: torch.dtype) -> Tensor:
    return F.embedding(ids, _weight_of(layer))


def _look_up_shape(ids: Tensor, _layer: str, columns: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty(*ids.shape, columns, dtype=dtype)


_operators: Any = torch.ops.emp_llm_serving
_library: Any = torch.library.Library("emp_llm_serving", "DEF")  # type: ignore[no-untyped-call]

for _schema, _work, _shape in (
    ("multiply(Tensor x, Tensor? bias, str layer, int rows)", _multiply, _multiply_shape),
    (
        "look_up(Tensor ids, str layer, int columns, ScalarType dtype)",
        _look_up,
        _look_up_shape,
    ),
):
    _defined = _library.define(f"{_schema} -> Tensor")
    _library.impl(_defined, _work, "CompositeExplicitAutograd")
    torch.library.register_fake(f"emp_llm_serving::{_defined}", _shape, lib=_library)
