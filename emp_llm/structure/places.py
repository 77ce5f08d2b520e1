"""What each parameter of a model is: a matrix of attention, of an expert, a norm, an embedding."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel


__all__ = ["Place", "find_places"]


_ATTENTION_CLASS = re.compile(r"(Attention|Attn)(?!.*(Layer|Block|MLP|Head)$)")
_ATTENTION_NAME = re.compile(r"(^|_)(attn|attention)$", re.IGNORECASE)
_ROUTER_CLASS = re.compile(r"Router|TopKGating|Mo[Ee]\w*Gate$")
_ROUTER_NAME = re.compile(r"^(gate|router_gate|shared_expert_gate)$|(^|_)router$")
_EMBEDDING_CLASS = re.compile(r"Embedd(ings?|er)$")
_DOWN_NAME = re.compile(r"down|w2|output")


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """What one parameter or buffer of the model is.

    Attributes:
        shape: Its shape in the model; None for a buffer.
        why_not: Why it is never pruned ('embedding', 'norm', 'bias', 'router', ...); None if it is
            a matrix of a linear layer, or such matrices of several experts.
        block: Name, in the model, of the decoder or encoder block that it is in, or None.
        attention: Whether it belongs to an attention module.
        expert: Whether it belongs to an expert of a mixture of experts.
        transposed: Whether it is stored [.., in, out] rather than [.., out, in].
        tied_to: Name, in the model, of the parameter that transformers ties it to, or None.
        saved: Whether `save_pretrained` writes it; not if the model computes it when it is made.
    """

    shape: tuple[int, ...] | None
    why_not: str | None
    block: str | None
    attention: bool
    expert: bool
    transposed: bool
    tied_to: str | None = None
    saved: bool = True


def find_places(model: "PreTrainedModel") -> dict[str, Place]:
    """What each parameter and buffer of a model is, by its name in the model.

    Args:
        model: Any model of transformers, on any device.

    Returns:
        Place by name; a parameter that several modules share is there by each of its names.
    """
    places = dict(_walk(model, _Scope(heads=frozenset(_heads(model)))))
    _exclude_tied(places, getattr(model, "all_tied_weights_keys", {}))
    for name in places.keys() & set(model._keys_to_ignore_on_save or ()):
        places[name] = replace(places[name], saved=False)
    return places


def _exclude_tied(places: dict[str, Place], tied: Mapping[str, str]) -> None:
    # both ways: pruning either of two tied parameters changes the other
    pairs = [
        pair for target, source in tied.items() for pair in ((target, source), (source, target))
    ]
    for name, other in pairs:
        place, partner = places.get(name), places.get(other)
        if place is None or partner is None or place.why_not not in (None, "lm_head"):
            continue
        if partner.why_not in ("embedding", "lm_head"):
            places[name] = replace(place, why_not=f"tied to {other}")
    for target, source in tied.items():
        if target in places and source in places:
            places[target] = replace(places[target], tied_to=source)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scope:
    """What a module inherits from the modules that hold it."""

    heads: frozenset[int]
    prefix: str = ""
    block: str | None = None
    attention: bool = False
    expert: bool = False
    router: bool = False
    embedding: bool = False
    head: bool = False


def _walk(module: "nn.Module", scope: _Scope) -> Iterator[tuple[str, Place]]:
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield scope.prefix + name, _place(module, name, parameter, scope)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield scope.prefix + name, _buffer_place(scope)
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, _enter(module, name, child, scope))


def _enter(parent: "nn.Module", name: str, child: "nn.Module", scope: _Scope) -> _Scope:
    from torch import nn
    from transformers import PreTrainedModel

    class_name = type(child).__name__
    starts = scope.block is None and isinstance(parent, nn.ModuleList) and _is_block(child)
    embeds = bool(_EMBEDDING_CLASS.search(class_name)) and not isinstance(child, PreTrainedModel)
    return replace(
        scope,
        prefix=f"{scope.prefix}{name}.",
        block=scope.prefix + name if starts else scope.block,
        attention=scope.attention or _is_attention(name, child),
        expert=scope.expert or "expert" in f"{name} {class_name}".lower(),
        router=scope.router or bool(_ROUTER_NAME.search(name) or _ROUTER_CLASS.search(class_name)),
        # the modules of some models hold their decoder blocks in one that is called an embedder
        embedding=embeds or (scope.embedding and not starts),
        head=scope.head or name == "lm_head" or id(child) in scope.heads,
    )


def _is_attention(name: str, module: "nn.Module") -> bool:
    return bool(_ATTENTION_NAME.search(name) or _ATTENTION_CLASS.search(type(module).__name__))


def _is_block(module: "nn.Module") -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    if _is_linear(module) or not any(map(_is_linear, module.modules())):
        return False
    if isinstance(module, GradientCheckpointingLayer):
        return True
    # not all models derive their blocks from that class: attention shows the others, unless the
    # module is only a wrapper around blocks that are
    inner = list(module.named_modules())[1:]
    return any(_is_attention(name.rpartition(".")[2], part) for name, part in inner) and not any(
        isinstance(part, GradientCheckpointingLayer) for _, part in inner
    )


def _is_linear(module: "nn.Module") -> bool:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, nn.Linear | Conv1D)


def _heads(model: "PreTrainedModel") -> Iterator[int]:
    """Ids of the output heads: the modules that map hidden states to scores of tokens."""
    from transformers import PreTrainedModel

    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            get_head: Callable[[], object] = part.get_output_embeddings
            try:
                head = get_head()
            except (AttributeError, NotImplementedError):
                continue
            yield id(head)


def _place(module: "nn.Module", name: str, parameter: "Tensor", scope: _Scope) -> Place:
    return Place(
        shape=tuple(parameter.shape),
        why_not=_why_not(module, name, parameter, scope),
        block=scope.block,
        attention=scope.attention,
        expert=scope.expert,
        transposed=_is_transposed(module),
    )


def _buffer_place(scope: _Scope) -> Place:
    return Place(
        shape=None,
        why_not="buffer",
        block=scope.block,
        attention=scope.attention,
        expert=scope.expert,
        transposed=False,
    )


def _why_not(module: "nn.Module", name: str, parameter: "Tensor", scope: _Scope) -> str | None:
    from torch import nn

    class_name = type(module).__name__
    # the order matters: a norm in an embedding is a norm, a linear layer in a router is a router's
    if "Norm" in class_name:
        return "norm"
    if scope.embedding or isinstance(module, nn.Embedding):
        return "embedding"
    if scope.head:
        return "lm_head"
    if scope.router:
        return "router"
    if name.endswith("bias"):
        return "bias"
    fused = parameter.ndim == 3 and (hasattr(module, "is_transposed") or scope.expert)
    linear = name == "weight" and _is_linear(module)
    return None if fused or linear else "not a linear layer"


def _is_transposed(module: "nn.Module") -> bool:
    """Whether the module's matrices are stored [.., in, out].

    Modules of fused experts have an attribute that says so. Where it is missing, the shape shows
    it: that of a matrix from ``in_features`` to ``out_features``, as Aria's experts have in older
    transformers, or of a projection from the hidden size to another one, as Llama 4's have.
    """
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):
        return True
    if hasattr(module, "is_transposed"):
        return bool(module.is_transposed)
    stacks = [parameter for parameter in module.parameters(recurse=False) if parameter.ndim == 3]
    features = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if any(stack.shape[-2:] == features for stack in stacks):
        return True
    hidden = getattr(module, "hidden_size", getattr(module, "hidden_dim", None))
    return any(
        parameter.ndim == 3 and parameter.shape[-2] == hidden != parameter.shape[-1]
        for name, parameter in module.named_parameters(recurse=False)
        if not _DOWN_NAME.search(name)
    )
