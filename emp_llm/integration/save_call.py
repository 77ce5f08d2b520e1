"""``save_pretrained``: a folder is packed and its config.json says so, or neither.

transformers writes config.json first, and leaves out the conversions that pack where it is asked
for the parameters' own names. So it is decided before the call what will be written.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from emp_llm.checkpoint.left_behind import CONFIG_NAME
from emp_llm.integration.keeping import packed_parameters
from emp_llm.integration.saving import (
    Record,
    conversions_in_use,
    own_names_packed,
    record,
    without_packing,
)
from emp_llm.report.file_names import OF_THEIR_OWN, REPORT_NAME
from emp_llm.resident.dense_weights import NUMBER_FORMATS
from emp_llm.resident.packing import is_large
from emp_llm.resident.weight import PackedWeight
from emp_llm.tensors.packed_config import QUANT_METHOD

__all__ = ["save"]

_CALLER = 3
"""How many frames above `save` the line is that calls `save_pretrained`, counted from 1."""


def save(
    save_pretrained: Callable[..., Any],
    model: PreTrainedModel,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> object:
    """Call a model's `save_pretrained`, and have it pack, or not say that it does.

    Args:
        save_pretrained: transformers' method, bound to the model.
        model: Any model.
        args: Arguments of the call.
        kwargs: Arguments of the call, by name.
    """
    call = signature(save_pretrained).bind(*args, **kwargs)
    with ExitStack() as changes:
        if not getattr(model, "_hf_peft_config_loaded", False):  # else only adapters are saved
            for message in _prepare(model, call.arguments, changes):
                warnings.warn(message, stacklevel=_CALLER)
            if call.arguments.get("state_dict") is None and packed_parameters(model):
                call.arguments["state_dict"] = _without_tied(model)
        return save_pretrained(*call.args, **call.kwargs)


def _without_tied(model: PreTrainedModel) -> dict[str, Tensor]:
    """A model's state without the packed weights that are tied to others.

    transformers compares where tied weights begin and end in memory; packed ones have no such end.
    """
    state: dict[str, Tensor] = model.state_dict()
    for name, source in model.all_tied_weights_keys.items():
        if source in state and isinstance(state.get(name), PackedWeight):
            del state[name]
    return state


def _prepare(
    model: PreTrainedModel, arguments: dict[str, Any], changes: ExitStack
) -> Iterator[str]:
    """Change what has to be changed during the call; what the user is to be warned of."""
    folder = Path(arguments["save_directory"])
    known, packed = record(model), list(_packed_configs(model.config))
    if arguments.get("is_main_process", True):
        yield from _stale_report(folder)
        if known is not None or packed:
            changes.enter_context(_config_put_back(folder))
    if known is not None and any(config is model.config for config in packed):
        why_not = _why_not(model, known, arguments)
        if why_not is None:
            if not arguments.get("save_original_format", True):
                arguments["save_original_format"] = True
                changes.enter_context(conversions_in_use(model, own_names_packed(model, known)))
            return
        yield f"{type(model).__name__} is saved as an ordinary checkpoint: {why_not}"
    # As is a model that has lost its config, or got that of a packed one: a part, or a fresh one.
    changes.enter_context(_unsaid(packed))
    if known is not None:
        changes.enter_context(conversions_in_use(model, without_packing(model)))


def _why_not(model: PreTrainedModel, known: Record, arguments: Mapping[str, Any]) -> str | None:
    """Why nothing of what is saved can be packed; None if something can."""
    if arguments.get("distributed_checkpoint"):
        return "distributed_checkpoint=True is not packed"
    tensors: Mapping[str, Tensor] | None = arguments.get("state_dict")
    if tensors is None:
        tensors = dict(model.named_parameters(remove_duplicate=False))
    packed = [
        tensor
        for name, tensor in sorted(tensors.items())
        if name in known.parameters or (known.packs_rest and is_large(tensor))
    ]
    if not packed:
        return "none of the parameters that were pruned or packed is saved"
    if any(tensor.dtype in NUMBER_FORMATS for tensor in packed):
        return None
    dtype = str(packed[0].dtype).removeprefix("torch.")
    return f"{dtype} is not packed; cast it to float16, bfloat16 or float32 first"


def _packed_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Those of a configuration and its parts that say that weights are packed."""
    said = getattr(config, "quantization_config", None)
    method = said.get("quant_method") if isinstance(said, dict) else said and said.quant_method
    if method == QUANT_METHOD:
        yield config
    for part in vars(config).values():
        if isinstance(part, PreTrainedConfig):
            yield from _packed_configs(part)


@contextmanager
def _unsaid(packed: Sequence[PreTrainedConfig]) -> Iterator[None]:
    """Have no configuration say that weights are packed."""
    said = [config.quantization_config for config in packed]
    for config in packed:
        del config.quantization_config
    try:
        yield
    finally:
        for config, quantization in zip(packed, said, strict=True):
            config.quantization_config = quantization


@contextmanager
def _config_put_back(folder: Path) -> Iterator[None]:
    """If a save fails, leave no config.json that says of older weights, or none, what they are."""
    path = folder / CONFIG_NAME
    before = path.read_bytes() if path.is_file() else None
    try:
        yield
    except BaseException:
        if before is not None:
            path.write_bytes(before)
        elif path.is_file():
            path.unlink()
        raise


def _stale_report(folder: Path) -> Iterator[str]:
    if (folder / REPORT_NAME).is_file():
        stale = [name for name in OF_THEIR_OWN if (folder / name).is_file()]
        yield (
            f"{folder}: {', '.join(stale)} describe the weights that are being replaced: delete "
            "them, or save to another folder"
        )
