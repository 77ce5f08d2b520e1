"""The lines of Python that load a written folder."""

import json
from collections.abc import Mapping
from typing import Any

from emp_llm.packed import QUANT_METHOD

__all__ = ["ANY_NAME", "auto_class", "is_packed", "loading_code"]

ANY_NAME = "path or id of this model"
"""Stands in the lines where it is not known yet what the model will be called."""

# an architecture called …ForCausalLM is loaded by AutoModelForCausalLM, and so on
_HEADS = (
    *("CausalLM", "MaskedLM", "PreTraining", "SequenceClassification", "TokenClassification"),
    *("QuestionAnswering", "MultipleChoice", "NextSentencePrediction", "ImageClassification"),
)


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a packed checkpoint."""
    method = config.get("quantization_config")
    return isinstance(method, dict) and method.get("quant_method") == QUANT_METHOD


def auto_class(config: Mapping[str, Any]) -> str:
    """Choose the class of transformers that loads a model, by its configuration.

    Told from the architecture's name alone, without transformers; ``AutoModel``, which loads every
    model without its head, where the name does not say.
    """
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str):
        return "AutoModel"
    for head in _HEADS:
        if name.endswith(f"For{head}"):
            return f"AutoModelFor{head}"
    if name.endswith("LMHeadModel"):  # GPT-2 and its time
        return "AutoModelForCausalLM"
    if name.endswith("ForConditionalGeneration"):
        if "vision_config" in config:
            return "AutoModelForImageTextToText"
        if config.get("is_encoder_decoder") is True and "num_mel_bins" not in config:
            return "AutoModelForSeq2SeqLM"
    return "AutoModel"


def loading_code(config: Mapping[str, Any], name: str, revision: str | None = None) -> list[str]:
    """Write the lines of Python that load a model.

    Args:
        config: The content of its ``config.json``.
        name: Its folder or Hub id.
        revision: Where on the Hub it is, if not on the default branch.
    """
    loader = auto_class(config)
    arguments = [_literal(name)]
    if revision is not None:
        arguments.append(f"revision={_literal(revision)}")
    needed = ["import emp_llm  # registers the packed format"] if is_packed(config) else []
    return [
        *needed,
        f"from transformers import {loader}",
        f"model = {loader}.from_pretrained({', '.join(arguments)})",
    ]


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
