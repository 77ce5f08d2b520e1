"""A prompt as a model's tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from emp_llm.errors import CheckpointError, OptionError
from emp_llm.messages import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["prompt_ids"]


def prompt_ids(
    name: str, tokenizer: PreTrainedTokenizerBase, prompt: str, *, chat: bool
) -> list[int]:
    """The tokens of a prompt, with the special ones that the tokenizer or its template adds.

    Args:
        name: What the user called the model.
        tokenizer: Its tokenizer.
        prompt: The prompt.
        chat: Whether it is a user's message for the tokenizer's chat template.

    Raises:
        OptionError: If there are no tokens.
        CheckpointError: If a chat template is asked for and there is none that works.
    """
    if chat:
        ids = _chat_ids(name, tokenizer, prompt)
    else:  # a prompt that is too long is told of where the model's positions are known
        ids = list(tokenizer(prompt, verbose=False)["input_ids"])
    if not ids:
        raise OptionError("the prompt has no tokens: give some text to continue")
    return ids


def _chat_ids(name: str, tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    from jinja2.exceptions import TemplateError

    if tokenizer.chat_template is None:
        raise OptionError(
            f"{name}: its tokenizer has no chat template, so the model was hardly trained to chat: "
            "leave --chat (chat=True) out, and give a text to continue"
        )
    try:
        ids: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_dict=False,
        )
    except (TemplateError, ValueError) as error:
        raise CheckpointError(
            f"{name}: the chat template of its tokenizer does not take a user's message: "
            f"{first_line(error)}: leave --chat (chat=True) out"
        ) from error
    return list(ids)
