"""The options of an evaluation."""

from __future__ import annotations

import os
from dataclasses import dataclass

from emp_llm.errors import OptionError
from emp_llm.evaluation.model_loading import Dtype, check_dtype
from emp_llm.texts.texts import Protocol, check_protocol

__all__ = ["EvalOptions"]


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What is measured, and how.

    Args:
        texts: Texts to measure the perplexity on, as `emp_llm.texts.texts.read_text` takes them.
        tasks: Tasks of lm-eval, as `emp_llm.evaluation.tasks.find_tasks` takes them; ``paper7``
            stands for those of the EMP paper.
        protocol: How perplexity is computed, ``paper`` or ``gptq``; see
            `emp_llm.evaluation.perplexity.perplexity`.
        context: Tokens in a window of it; 2 or more.
        dtype: ``auto`` (as the weights are stored), ``bfloat16``, ``float16`` or ``float32``.
        device: ``auto`` (all GPUs there are, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.
        include_path: A folder with more tasks.
        num_fewshot: Examples before each question; as each task has it if None.
        limit: Questions of each task; all if None.
        batch_size: Answers that are scored together; None finds the largest that fits on a GPU.
        trust_remote_code: Whether code that comes with a model or its tokenizer may be run.

    Raises:
        OptionError: If there is nothing to measure or a value is out of its range.
    """

    texts: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    protocol: Protocol = "paper"
    context: int = 2048
    dtype: Dtype = "auto"
    device: str = "auto"
    include_path: str | os.PathLike[str] | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int | None = 1
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for option in ("texts", "tasks"):
            if isinstance(getattr(self, option), str):
                raise OptionError(f"{option} is a single string; give a tuple of them")
        if not self.texts and not self.tasks:
            raise OptionError("there is nothing to measure: give texts, tasks or both")
        check_protocol(self.protocol)
        check_dtype(self.dtype)
        for option, fewest in (("context", 2), ("num_fewshot", 0), ("limit", 1), ("batch_size", 1)):
            value = getattr(self, option)
            if value is not None and value < fewest:
                raise OptionError(f"{option} is {value}; give {fewest} or more")
