"""A model that is to be evaluated: found, proved whole where it is packed, and loaded.

name → folder, fetched if it is of the Hub → packed? verified → from_pretrained
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from emp_llm.checkpoint.json_files import read_json_object
from emp_llm.checkpoint.small_files import CONFIG_NAME
from emp_llm.errors import CheckpointError
from emp_llm.hub.source import Source, find_source
from emp_llm.report.file_names import REPORT_NAME
from emp_llm.runtime.progress import SharedProgress
from emp_llm.structure.auto_class import auto_class
from emp_llm.tensors.packed_config import is_packed
from emp_llm.verification.written_folder import check_written

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from emp_llm.integration.configs import EmpConfig
    from emp_llm.runtime.progress import Progress
from emp_llm.texts.tokenizer import _explained, _silent_transformers, load_tokenizer

__all__ = ["Dtype", "Found", "find_model", "load_model"]


Dtype = Literal["auto", "bfloat16", "float16", "float32"]

_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A model that is there.

    Attributes:
        name: What the user called it.
        source: Where it lies; all of it is there.
        config: The content of its ``config.json``.
        packed: Whether it is packed.
    """

    name: str
    source: Source
    config: dict[str, Any]
    packed: bool


def find_model(
    model: str | os.PathLike[str], *, revision: str | None = None, progress: Progress
) -> Found:
    """Find a model, fetch it if it is one of the Hub, and verify it if it is packed.

    A packed folder without a report, as `save_pretrained` writes it, is checked when it is loaded.

    Raises:
        CheckpointError: If it is no causal language model that can be loaded; HubError if the Hub
            refuses.
        FormatError: If it is packed and not as it was written.
        OptionError: If a revision is given for a local folder.
    """
    told = SharedProgress(progress)
    source = find_source(model, revision=revision, progress=told)
    if not (source.folder / CONFIG_NAME).is_file():
        source.open_checkpoint()  # says what it is instead, if it is no checkpoint
        raise CheckpointError(
            f"{os.fspath(model)}: is in Meta's original format, which transformers does not load: "
            "give what `emp-llm prune` makes of it, or the model in Hugging Face's layout"
        )
    config = read_json_object(source.folder / CONFIG_NAME)
    if config.get("architectures") and auto_class(config) not in _CLASSES:
        raise CheckpointError(
            f"{os.fspath(model)}: is a {config['architectures'][0]}; perplexity and tasks are "
            "measured on models that predict the next token: give one of those"
        )
    if source.to_come:
        _fetch(source, told)
    packed = is_packed(config)
    if packed and (source.folder / REPORT_NAME).is_file():
        check_written(source.folder, progress=progress)
    return Found(name=os.fspath(model), source=source, config=config, packed=packed)


def _fetch(source: Source, progress: SharedProgress) -> None:
    shards = source.open_checkpoint().shards
    with source.files(shards) as files:
        progress.begin("reading", 0)
        for shard in shards:
            files.file(shard)


def load_model(
    found: Found, *, dtype: Dtype, device: str, pruning: EmpConfig | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    Args:
        found: The model.
        dtype: What its weights are made; ``auto`` leaves them as they are stored.
        device: ``auto`` (all GPUs as accelerate spreads it, else the CPU), ``cpu``, ``cuda`` or
            ``cuda:N``.
        pruning: How to prune it while it is loaded, if at all.

    Raises:
        CheckpointError: If transformers does not load it, or makes up some of its weights.
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
    # None in its place would take away what a packed checkpoint says of itself
    more = {} if pruning is None else {"quantization_config": pruning}
    tokenizer = load_tokenizer(found.name, folder)
    with _silent_transformers(), _explained(found.name, "it"):
        model, info = loader.from_pretrained(
            folder,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            device_map=device_map,
            output_loading_info=True,
            **more,
        )
    made_up = sorted(info["missing_keys"])
    if made_up:
        raise CheckpointError(
            f"{found.name}: has no weights for {made_up[0]!r} ({len(made_up)} missing), which "
            "transformers has made up at random: give a checkpoint with all of its weights"
        )
    _check_tokenizer(found.name, model, tokenizer)
    return model, tokenizer


def _check_tokenizer(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    embeddings = model.get_input_embeddings().get_parameter("weight").shape[0]
    if tokenizer.vocab_size > embeddings:  # tokens that were added later do not count
        raise CheckpointError(
            f"{name}: its tokenizer has {tokenizer.vocab_size} tokens, the model {embeddings} "
            "embeddings: it is the tokenizer of another model, put the model's own in the folder"
        )
