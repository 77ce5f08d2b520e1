"""A checkpoint's model without its weights, built from its config on the meta device.

No code from the checkpoint is run: the classes are transformers' own. torch and transformers are
imported only when a model is built.
"""

import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emp_llm.checkpoint.json_files import read_json_object
from emp_llm.checkpoint.left_behind import CONFIG_NAME
from emp_llm.errors import CheckpointError
from emp_llm.messages import first_line, shortened
from emp_llm.tensors.packed_config import is_packed, quant_method

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["build_meta_model"]

_COUNTS = re.compile(r"layer|label|blocks|depth|stages|experts|rank|dense_replace|kernel_size")
_MOST = 100_000
_PARTS = 100_000  # modules and parameters; a Llama of 126 layers has 2,700
_PARTS_PER_TENSOR = 50


def build_meta_model(
    folder: Path,
    tensors: int = 0,
    config: Mapping[str, Any] | None = None,
    *,
    runs: bool = False,
) -> "PreTrainedModel":
    """Build the model that a checkpoint's config describes, on the meta device.

    Its class is the first of ``config.architectures`` that transformers has; if it has none of
    them, the one that AutoModel takes. Call this under `calm`, which keeps it silent and quick.

    Args:
        folder: The checkpoint's folder; only its ``config.json`` is read.
        tensors: How many tensors the checkpoint has. A config that describes a model of very many
            more modules and parameters is refused before all of them are built.
        config: The content of ``config.json`` if the folder has none.
        runs: Whether the model will be run; it then uses torch's own attention if it can.

    Returns:
        The model; all its parameters and buffers are on the meta device.

    Raises:
        CheckpointError: If the config cannot be read, is not one of transformers', needs code
            from the checkpoint, or says that the weights are quantized or packed.
    """
    path = folder / CONFIG_NAME
    raw = config or read_json_object(path)
    _check_dense(raw, path)
    _check_counts(raw, path)
    try:
        made = _config(raw, path, in_file=config is None)
        with _bounded(path, tensors):
            return _build(_model_class(made, raw, path), made, path, runs=runs)
    except ImportError as error:
        raise CheckpointError(
            f"{path}: this model needs a package that is not installed: {first_line(error)}"
        ) from error


def _check_dense(raw: Mapping[str, Any], path: Path) -> None:
    for part in (raw, *(value for value in raw.values() if isinstance(value, dict))):
        if is_packed(part):
            raise CheckpointError(
                f"{path}: the checkpoint is already packed by emp-llm; run 'emp-llm unpack' on it "
                "or give its dense source"
            )
        quantization = part.get("quantization_config") or part.get("compression_config")
        if not quantization:
            continue
        method = quant_method({"quantization_config": quantization})
        by = f"quant_method {method!r}" if method else "no quant_method is given, as by MLX"
        raise CheckpointError(
            f"{path}: the checkpoint is quantized ({by}); emp-llm prunes float16, bfloat16 and "
            "float32. Load a dequantized checkpoint."
        )


def _check_counts(raw: Mapping[str, Any], path: Path) -> None:
    """Refuse absurd counts of parts, which transformers would build until memory runs out."""
    parts: list[Mapping[str, Any]] = [raw]
    while parts:
        for key, value in parts.pop().items():
            if isinstance(value, dict):
                parts.append(value)
            elif isinstance(value, int | float) and value > _MOST and _COUNTS.search(key):
                raise CheckpointError(
                    f"{path}: {shortened(key)} is {shortened(value)}; no model has more than "
                    f"{_MOST:,}: download it again"
                )


@contextmanager
def _bounded(path: Path, tensors: int) -> Iterator[None]:
    """Stop building a model once it has far more parts than its checkpoint has tensors."""
    from torch.nn.modules import module as hooks

    thread, left = threading.get_ident(), _PARTS + _PARTS_PER_TENSOR * tensors

    def count(*_: object) -> None:
        nonlocal left
        left -= threading.get_ident() == thread
        if left < 0:
            raise CheckpointError(
                f"{path}: describes a far larger model than one of the checkpoint's {tensors:,} "
                "tensors: the weights and the config do not belong together"
            )

    handles = [
        hooks.register_module_module_registration_hook(count),
        hooks.register_module_parameter_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _config(raw: Mapping[str, Any], path: Path, *, in_file: bool) -> "PretrainedConfig":
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    if not isinstance(raw.get("model_type"), str):
        raise CheckpointError(
            f"{path}: has no model_type, which says how the model is built; add it"
        )
    if raw["model_type"] not in CONFIG_MAPPING:
        raise _unknown(f"model_type {raw['model_type']!r}", raw, path)
    try:
        if not in_file:
            content = json.loads(json.dumps(raw), object_hook=_decoded)
            made: PretrainedConfig = CONFIG_MAPPING[raw["model_type"]].from_dict(content)
            return made
        config: PretrainedConfig = AutoConfig.from_pretrained(
            path.parent, trust_remote_code=False, local_files_only=True
        )
    except ImportError:
        raise
    except Exception as error:
        config_is = "this config" if in_file else "the config that is made of this one"
        raise CheckpointError(
            f"{path}: transformers refuses {config_is}: {first_line(error)}"
        ) from error
    return config


def _decoded(found: dict[str, Any]) -> dict[str, Any] | float:
    """An object of a config, or the float that it stands for: JSON has no infinity."""
    is_float = found.keys() == {"__float__"}
    return float(found["__float__"]) if is_float else found


def _model_class(
    config: "PretrainedConfig", raw: Mapping[str, Any], path: Path
) -> "type[PreTrainedModel]":
    import transformers

    architectures = config.architectures or []
    if not isinstance(architectures, list):
        raise CheckpointError(
            f"{path}: architectures is {shortened(architectures)}; it must be a list of names of "
            "transformers' classes"
        )
    names = [name for name in architectures if isinstance(name, str)]
    for name in names:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    if names and raw.get("auto_map"):
        raise _unknown(f"the architecture {names[0]!r}", raw, path)
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    fallback: Any = MODEL_MAPPING.get(type(config), None)
    if fallback is None:
        raise _unknown(f"a model for model_type {config.model_type!r}", raw, path)
    model_class: type[PreTrainedModel] = fallback[0] if isinstance(fallback, tuple) else fallback
    return model_class


def _build(
    model_class: "type[PreTrainedModel]", config: "PretrainedConfig", path: Path, *, runs: bool
) -> "PreTrainedModel":
    from accelerate import init_empty_weights

    # both only matter when the model runs, but a config can name a kernel to download from the Hub
    fast = runs and getattr(model_class, "_supports_sdpa", False)
    config._attn_implementation = "sdpa" if fast else "eager"
    config._experts_implementation = "eager"
    try:
        # With buffers it sets torch's default device, by which transformers knows that there is
        # nothing to initialise; without, it would make each parameter on the CPU first.
        with init_empty_weights(include_buffers=True):
            return model_class(config)
    except (ImportError, CheckpointError):
        raise
    except Exception as error:
        raise CheckpointError(
            f"{path}: {model_class.__name__} cannot be built from it: {first_line(error)}"
        ) from error


def _unknown(what: str, raw: Mapping[str, Any], path: Path) -> CheckpointError:
    from transformers import __version__

    remedy = (
        "its code is in the checkpoint, and emp-llm runs no code from a checkpoint to prune it"
        if raw.get("auto_map")
        else "a newer release may"
    )
    return CheckpointError(f"{path}: transformers {__version__} does not know {what}; {remedy}")
