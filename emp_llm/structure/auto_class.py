"""The class of transformers that loads a model."""

from collections.abc import Mapping
from typing import Any

__all__ = ["auto_class"]


# an architecture called …ForCausalLM is loaded by AutoModelForCausalLM, and so on
_HEADS = (
    *("CausalLM", "MaskedLM", "PreTraining", "SequenceClassification", "TokenClassification"),
    *("QuestionAnswering", "MultipleChoice", "NextSentencePrediction", "ImageClassification"),
)


def auto_class(config: Mapping[str, Any]) -> str:
    """The class of transformers that loads a model, such as ``AutoModelForCausalLM``.

    It is read off the name of the architecture, without importing transformers. If the name does
    not say, it is ``AutoModel``, which loads every model without its head.

    Args:
        config: The content of ``config.json``.

    >>> auto_class({"architectures": ["LlamaForCausalLM"]})
    'AutoModelForCausalLM'
    """
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if not isinstance(name, str):
        return "AutoModel"
    for head in _HEADS:
        if name.endswith(f"For{head}"):
            return f"AutoModelFor{head}"
    if name.endswith("LMHeadModel"):  # GPT-2 and models of its time
        return "AutoModelForCausalLM"
    if name.endswith("ForConditionalGeneration"):
        if "vision_config" in config:
            return "AutoModelForImageTextToText"
        if config.get("is_encoder_decoder") is True and "num_mel_bins" not in config:
            return "AutoModelForSeq2SeqLM"
    return "AutoModel"
