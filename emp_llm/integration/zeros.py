"""Finds the pruned parameters of a model, keeps masks of their zeros, and zeroes them again."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from emp_llm.errors import OptionError
from emp_llm.integration.saving import record
from emp_llm.integration.zero_mask import Mask
from emp_llm.resident.weight import PackedWeight

__all__ = ["Pruned", "find_pruned", "put_back", "recorded", "take_masks"]

Pruned = dict[str, list[nn.Parameter]]
"""Pruned parameters by the name that they have without wrappers and adapters: first the base
model's own, then the copies of it that adapters train in its place."""

_EXAMPLES = 3


def take_masks(model: nn.Module, parameters: str | Sequence[str] | None) -> dict[str, Mask]:
    """Make masks of a model's pruned parameters, from the values in the base model.

    Args:
        model: The model, wrapped or not.
        parameters: As for `find_pruned`.

    Raises:
        OptionError: As `find_pruned` raises it; or if none of the parameters in the model's record
            has a zero, or one that `parameters` chooses has none.
    """
    masks = {name: Mask(first) for name, (first, *_) in find_pruned(model, parameters).items()}
    without = [name for name, mask in masks.items() if not mask.zeros]
    if without and (parameters is not None or len(without) == len(masks)):
        raise OptionError(
            f"{without[0]!r} holds no zero ({len(without)} of {len(masks)} parameters do not): it "
            "was never pruned, or was trained without holding its zeros; load the pruned "
            "checkpoint again" + (" or narrow parameters" if parameters is not None else "")
        )
    return masks


def put_back(pruned: Pruned, masks: Mapping[str, Mask]) -> None:
    """Put the zeros back into parameters and all their copies."""
    for name, mask in masks.items():
        for parameter in pruned.get(name, ()):
            mask.clear(parameter)


def recorded(model: nn.Module) -> list[PreTrainedModel]:
    """The models in a module, itself included, that have a record of what was pruned."""
    parts = [part for _, part in _outermost(model, "", _has_record)]
    return [part for part in parts if isinstance(part, PreTrainedModel) and _has_record(part)]


def find_pruned(model: nn.Module, parameters: str | Sequence[str] | None) -> Pruned:
    """Find the parameters whose zeros are to be held.

    Wrappers (DDP, torch.compile, PEFT) and adapters do not change their names. A parameter that is
    tied to another one is found once.

    Args:
        model: The model, wrapped or not.
        parameters: Names of parameters, or regular expressions searched in the names of those with
            at least two dimensions; None for those that the model's record names.

    Raises:
        OptionError: If `parameters` is None and the model has no record; if a name or expression
            matches nothing; or if a parameter is split over processes, offloaded, packed in memory,
            or not a floating-point tensor.
    """
    _refuse_fsdp(model)
    pruned = _named_by_records(model) if parameters is None else _chosen(model, parameters)
    for name, copies in pruned.items():
        for parameter in copies:
            _check(name, parameter)
    return pruned


def _named_by_records(model: nn.Module) -> Pruned:
    parts = recorded(model)
    if not parts:
        raise OptionError(
            f"this {type(model).__name__} does not say what was pruned in it: it was neither "
            "loaded from a packed checkpoint nor pruned by EmpConfig; name the pruned parameters, "
            "such as parameters=['mlp']"
        )
    pruned: Pruned = {}
    seen: set[int] = set()
    for path, part in _outermost(model, "", _has_record):
        names = _names_of(part)
        for name, parameter in _walk(part, ""):
            if name in names and id(parameter) not in seen:
                seen.add(id(parameter))
                pruned.setdefault(name if len(parts) == 1 else path + name, []).append(parameter)
    if not pruned:
        raise OptionError(
            f"nothing was pruned in this {type(model).__name__}, or it no longer has the "
            "parameters that were: name the ones whose zeros are to be held by parameters=[...]"
        )
    return pruned


def _names_of(part: nn.Module) -> frozenset[str]:
    known = record(part) if isinstance(part, PreTrainedModel) else None
    return frozenset() if known is None else known.parameters


def _chosen(model: nn.Module, parameters: str | Sequence[str]) -> Pruned:
    wanted = [parameters] if isinstance(parameters, str) else list(parameters)
    parts = list(_outermost(model, "", lambda part: isinstance(part, PreTrainedModel)))
    everything: Pruned = {}
    for path, part in parts:
        for name, parameter in _walk(part, ""):
            everything.setdefault(name if len(parts) == 1 else path + name, []).append(parameter)
    names = {name for pattern in wanted for name in _matching(pattern, everything, model)}
    seen: set[int] = set()
    pruned: Pruned = {}
    for name, copies in everything.items():
        new = [parameter for parameter in copies if id(parameter) not in seen]
        if name in names and new:
            seen.update(map(id, new))
            pruned[name] = new
    return pruned


def _matching(pattern: str, everything: Pruned, model: nn.Module) -> list[str]:
    if pattern in everything:
        return [pattern]
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise OptionError(
            f"parameters: {pattern!r} is not a regular expression: {error}; correct it"
        ) from error
    # No biases: they often start at zero, and are to be trained all the same.
    matrices = [name for name, (first, *_) in everything.items() if first.ndim > 1]
    found = [name for name in matrices if expression.search(name)]
    if not found:
        raise OptionError(
            f"parameters: {pattern!r} matches no matrix of this {type(model).__name__}; it has "
            f"{len(matrices)}, such as {', '.join(map(repr, matrices[-_EXAMPLES:]))}"
        )
    return found


def _has_record(part: nn.Module) -> bool:
    return isinstance(part, PreTrainedModel) and record(part) is not None


def _outermost(
    module: nn.Module, path: str, wanted: Callable[[nn.Module], bool]
) -> Iterator[tuple[str, nn.Module]]:
    """The outermost wanted modules with their paths; the module itself where there is none."""
    found = list(_wanted(module, path, wanted))
    yield from found or [(path, module)]


def _wanted(
    module: nn.Module, path: str, wanted: Callable[[nn.Module], bool]
) -> Iterator[tuple[str, nn.Module]]:
    if wanted(module):
        yield path, module
        return
    for name, child in module.named_children():
        yield from _wanted(child, f"{path}{name}.", wanted)


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by the names they would have without adapters; those of adapters left out."""
    # PEFT's layers and wrappers say this of themselves; what they wrap comes first in them.
    wrapped = hasattr(type(module), "adapter_layer_names")
    if not wrapped:
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter
    for name, child in module._modules.items():
        if child is None:
            continue
        if name == "_orig_mod" or (wrapped and name in ("base_layer", "original_module")):
            yield from _walk(child, prefix)
        elif wrapped and name == "modules_to_save":
            for copy in child.children():
                yield from _walk(copy, prefix)
        elif not wrapped:
            yield from _walk(child, f"{prefix}{name}.")


def _refuse_fsdp(model: nn.Module) -> None:
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise _split("the model", "FSDP")


def _check(name: str, parameter: nn.Parameter) -> None:
    if hasattr(parameter, "ds_id"):
        raise _split(repr(name), "DeepSpeed ZeRO-3")
    if hasattr(parameter, "placements"):
        raise _split(repr(name), "DTensor: FSDP or tensor parallelism")
    if isinstance(parameter, PackedWeight):
        raise OptionError(
            f"{name!r} stays packed in memory, where it is not trained and its zeros stay as they "
            "are: leave the holding of zeros out, or call emp_llm.densify(model) first to train or "
            "merge into it"
        )
    if parameter.is_meta:
        raise OptionError(
            f"{name!r} is on the meta device, for its weights are offloaded; zeros are held in "
            "weights that are in memory: load the model with a device_map that offloads nothing"
        )
    if not parameter.is_floating_point() or not parameter.ndim:
        raise OptionError(
            f"{name!r} is {str(parameter.dtype).removeprefix('torch.')} of shape "
            f"{list(parameter.shape)}; zeros are held in floating-point matrices: load the model "
            "without quantizing it or narrow parameters"
        )


def _split(what: str, how: str) -> OptionError:
    return OptionError(
        f"{what} is split over several processes ({how}), but zeros are held in whole weights: "
        "train with DDP, ZeRO-1, ZeRO-2 or on one device"
    )
