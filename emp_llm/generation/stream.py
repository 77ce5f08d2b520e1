"""Hands on a text while it is generated, and keeps the times at which its tokens come."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from transformers import TextStreamer

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from emp_llm.generation.listener import Listener

__all__ = ["Stream"]


class Stream(TextStreamer):
    """A streamer for `generate`, made right before it is called.

    Args:
        tokenizer: The model's tokenizer.
        listener: Who hears the text, special tokens left out.

    Attributes:
        times: When each token came, in seconds after the stream was made; [0] is the first new one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, listener: Listener) -> None:
        more: dict[str, Any] = {"skip_special_tokens": True}
        super().__init__(tokenizer, skip_prompt=True, **more)
        self._listener = listener
        self._start = time.perf_counter()
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then one new token after the other."""
        if not self.next_tokens_are_prompt:
            self.times.append(time.perf_counter() - self._start)
        put: Any = super().put  # which has no types
        put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on text that no further token can change."""
        if text:
            self._listener.hear(text)
        if stream_end:
            self._listener.end()
