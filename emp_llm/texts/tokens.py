"""Tokenizes a text, and checks that the model can take the tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from emp_llm.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from emp_llm.texts.texts import Text

__all__ = ["check_length", "check_tokens", "positions_of", "tokenized"]


def positions_of(config: PretrainedConfig) -> int | None:
    """How many tokens a model can see at once, by its configuration; None if that has no limit."""
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions


def check_length(name: str, length: int, positions: int | None) -> None:
    """Refuse windows that predict nothing, or that the model has no positions for.

    Raises:
        OptionError: If the length, called by that name, is below 2 or above the positions.
    """
    if length < 2:
        raise OptionError(f"{name} is {length}; so few tokens predict nothing: give 2 or more")
    if positions is not None and length > positions:
        raise OptionError(
            f"{name} is {length}; this model has {positions} positions: give {positions} or less"
        )


def tokenized(
    tokenizer: PreTrainedTokenizerBase, text: Text, embeddings: int, *, offsets: bool = False
) -> dict[str, Any]:
    """Tokenize the whole text, with the special tokens that the tokenizer adds by itself.

    Args:
        tokenizer: The tokenizer; it is not changed.
        text: Text of any length.
        embeddings: How many tokens the model has embeddings for.
        offsets: Whether to ask for ``offset_mapping``, which fast tokenizers have.

    Returns:
        ``input_ids``, and what else was asked for.

    Raises:
        OptionError: If it produces tokens that the model does not have.
    """
    # verbose=False: the text is longer than the model's positions, which is not a mistake here
    encoded = tokenizer(text.text, verbose=False, return_offsets_mapping=offsets)
    ids: list[int] = encoded["input_ids"]
    check_tokens(ids, embeddings, text.name)
    return dict(encoded)


def check_tokens(ids: Sequence[int], embeddings: int, name: str) -> None:
    """Refuse tokens that a model does not have.

    Args:
        ids: The tokens.
        embeddings: How many the model has embeddings for.
        name: What they are the tokens of, for the message.

    Raises:
        OptionError: If there are such tokens.
    """
    if ids and max(ids) >= embeddings:
        raise OptionError(
            f"the tokenizer gives token {max(ids)} for {name}, the model has {embeddings} "
            "embeddings: it is the tokenizer of another model, give the model's own"
        )
