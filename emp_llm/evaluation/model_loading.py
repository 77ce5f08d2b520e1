"""Loads a model that was found, and its tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from emp_llm.errors import CheckpointError, OptionError
from emp_llm.messages import shortened
from emp_llm.runtime.quiet import quiet_transformers
from emp_llm.structure.auto_class import auto_class
from emp_llm.texts.tokenizer import TRUST_REMEDY, load_errors, load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from emp_llm.evaluation.found_model import Found
    from emp_llm.integration.configs import EmpConfig

__all__ = ["Dtype", "check_dtype", "load_model"]

Dtype = Literal["auto", "bfloat16", "float16", "float32"]


def check_dtype(dtype: str) -> None:
    """Refuse a dtype that is no `Dtype`.

    Raises:
        OptionError: If it is none.
    """
    if dtype not in get_args(Dtype):
        raise OptionError(f"dtype is {dtype!r}; choose one of {', '.join(get_args(Dtype))}")


def load_model(
    found: Found,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: Dtype,
    device: str,
    trust_remote_code: bool = False,
    pruning: EmpConfig | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    Args:
        found: The model.
        tokenizer: Its tokenizer, if that is loaded already.
        dtype: What its weights are cast to; ``auto`` leaves them as they are stored.
        device: ``auto`` (all GPUs, over which accelerate spreads it, else the CPU), ``cpu``,
            ``cuda`` or ``cuda:N``.
        trust_remote_code: Whether code that comes with it may be run.
        pruning: How to prune it while it is loaded, or to keep it packed, if at all.

    Raises:
        CheckpointError: If transformers does not load it, weights are missing in it, its tokenizer
            has more tokens than it has embeddings, or it needs code that may not be run.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    loaders = {"AutoModelForImageTextToText": AutoModelForImageTextToText}
    loader: Any = loaders.get(auto_class(found.config), AutoModelForCausalLM)
    if device == "auto":
        device_map: str | dict[str, str] | None = "auto" if torch.cuda.is_available() else None
    else:
        device_map = {"": device}
    folder = found.source.folder
    if not trust_remote_code:
        _check_attention(found.name, found.config)
    # quantization_config=None would override what the config of a packed checkpoint says
    more = {} if pruning is None else {"quantization_config": pruning}
    if tokenizer is None:
        tokenizer = load_tokenizer(found.name, folder, trust_remote_code=trust_remote_code)
    with quiet_transformers(), load_errors(found.name, "it"):
        model, info = loader.from_pretrained(
            folder,
            trust_remote_code=trust_remote_code,
            allow_all_kernels=trust_remote_code,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            device_map=device_map,
            output_loading_info=True,
            **more,
        )
    made_up = sorted(info["missing_keys"])
    if made_up:
        raise CheckpointError(
            f"{found.name}: has no weights for {made_up[0]!r} ({len(made_up)} missing), which "
            "transformers has initialized at random: give a checkpoint with all of its weights"
        )
    _check_tokenizer(found.name, model, tokenizer)
    return model, tokenizer


def _check_attention(name: str, config: Mapping[str, object]) -> None:
    """Refuse a config that names a repository of the Hub whose code is to compute attention."""
    for key, value in config.items():
        if isinstance(value, dict) and key != "attn_implementation":
            _check_attention(name, value)
        elif "attn_implementation" in key and "/" in str(value):
            raise CheckpointError(
                f"{name}: its config says that attention is computed by code from the Hub "
                f"({key} is {shortened(value)}): remove that from config.json, or {TRUST_REMEDY}"
            )


def _check_tokenizer(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    embeddings = model.get_input_embeddings().get_parameter("weight").shape[0]
    if tokenizer.vocab_size > embeddings:  # tokens that were added later do not count
        raise CheckpointError(
            f"{name}: its tokenizer has {tokenizer.vocab_size} tokens, the model {embeddings} "
            "embeddings: it is the tokenizer of another model, put the model's own in the folder"
        )
