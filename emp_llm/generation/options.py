"""The options of a generation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from emp_llm.errors import OptionError
from emp_llm.evaluation.model_loading import Dtype, check_dtype

__all__ = ["GenerateOptions"]


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """How a text is generated.

    Args:
        keep_packed: Whether weights stay packed in memory, as `emp_llm.EmpConfig` does it: those of
            a packed model, or those of a dense one, which is pruned at β = 1 while it is loaded.
        max_new_tokens: Tokens to generate at most; the text also ends where the model ends it, and
            at the model's last position.
        chat: Whether the prompt is a user's message, put into the tokenizer's chat template; else
            the model continues it.
        temperature: 0 for the most probable token each time. Above, tokens are drawn from the
            probabilities of logits that are divided by it, by the model's own top-k and top-p.
        seed: Seed of what is drawn.
        threads: Threads on the CPU; torch's own number if None.
        dtype: ``auto`` (as the weights are stored), ``bfloat16``, ``float16`` or ``float32``.
        device: ``auto`` (all GPUs there are, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.
        trust_remote_code: Whether code that comes with a model or its tokenizer may be run.

    Raises:
        OptionError: If a value is out of its range.
    """

    keep_packed: bool = False
    max_new_tokens: int = 100
    chat: bool = False
    temperature: float = 0.0
    seed: int = 0
    threads: int | None = None
    dtype: Dtype = "auto"
    device: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        for option, fewest in (("max_new_tokens", 1), ("threads", 1), ("seed", 0)):
            value = getattr(self, option)
            if value is not None and value < fewest:
                raise OptionError(f"{option} is {value}; give {fewest} or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise OptionError(f"temperature is {self.temperature}; give 0 or more")
