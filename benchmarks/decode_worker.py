"""One way of `bench_decode.py` to hold a model, in a process of its own.

    python decode_worker.py WAY FOLDER
    python decode_worker.py check FOLDER

It loads the model and answers each line of standard input with a line of JSON:

    memory                       bytes that are resident now, were before loading, and at most
    threads N                    torch uses N threads from now on
    prefill TOKENS               seconds of one pass over so many tokens of one text
    decode TEXTS TOKENS          seconds of each token, of so many texts at once, the first left out

With "check" it says how far the logits of a packed checkpoint are off, and ends.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

import emp_llm
from emp_llm.runtime.memory import peak_bytes, resident_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["DENSE", "HALF", "WAYS"]

DENSE, HALF = "dense bf16", "dense fp16"
WAYS = {
    DENSE: ("dense", torch.bfloat16, False),
    HALF: ("dense", torch.float16, False),
    "packed": ("packed", torch.bfloat16, True),
    "packed, rest plain": ("plain", torch.bfloat16, True),
}
"""The checkpoint of each way, its dtype in memory, and whether it stays packed there."""

_PROMPT = 16
"""Tokens before those that are decoded."""


def main() -> None:
    """Answer line by line."""
    logging.disable_progress_bar()
    way, folder = sys.argv[1], Path(sys.argv[2])
    if way == "check":
        print(json.dumps(logit_errors(folder)))
        return
    before, start = resident_bytes(), time.perf_counter()
    _, dtype, keep_packed = WAYS[way]
    model = load(folder, dtype, keep_packed=keep_packed)
    print(json.dumps({"load_seconds": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        step, *numbers = line.split()
        match step:
            case "memory":
                answer = {"before": before, "resident": resident_bytes(), "peak": peak_bytes()}
            case "threads":
                torch.set_num_threads(int(numbers[0]))
                answer = {}
            case "prefill":
                answer = {"seconds": prefill(model, int(numbers[0]))}
            case _:
                answer = {"seconds": decode(model, *map(int, numbers))}
        print(json.dumps(answer), flush=True)


def load(folder: Path, dtype: torch.dtype, *, keep_packed: bool) -> PreTrainedModel:
    """A model, with its weights packed in memory or not."""
    options = {"quantization_config": emp_llm.EmpConfig(keep_packed=True)} if keep_packed else {}
    model: PreTrainedModel = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    return model


def logit_errors(folder: Path) -> dict[str, float]:
    """How far logits are off at most from those of the same weights in float32.

    Compiling kernels takes memory: this process does it for those that are measured.
    """
    packed = load(folder, torch.bfloat16, keep_packed=True)
    for texts in (1, 4, 16):
        decode(packed, texts, 1)
    logits = {"packed": some_logits(packed)}
    prefill(packed, 64)
    del packed
    dense = load(folder, torch.bfloat16, keep_packed=False)
    logits["dense"] = some_logits(dense)
    exact = some_logits(dense.float())
    return {name: float((found - exact).abs().max()) for name, found in logits.items()}


def some_logits(model: PreTrainedModel) -> torch.Tensor:
    """The logits of a few tokens, in float32."""
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=some_ids(model, 1, _PROMPT)).logits
        return logits.float()


def prefill(model: PreTrainedModel, tokens: int) -> float:
    """Seconds of one pass over a text, of which the last token's logits are wanted."""
    with torch.inference_mode():
        start = time.perf_counter()
        model(input_ids=some_ids(model, 1, tokens), logits_to_keep=1)
        return time.perf_counter() - start


def decode(model: PreTrainedModel, texts: int, tokens: int) -> list[float]:
    """Seconds of each token after the first, greedily, as `generate` does it."""
    times = Times()
    ids = some_ids(model, texts, _PROMPT)
    generate: Any = model.generate
    generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens + 1,
        min_new_tokens=tokens + 1,
        pad_token_id=0,
        streamer=times,
    )
    _prompt, _first, *_ = times.seconds
    return [after - at for at, after in zip(times.seconds[1:], times.seconds[2:], strict=False)]


class Times(BaseStreamer):
    """The times at which tokens come."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, _value: torch.Tensor) -> None:
        """Another token of all texts."""
        self.seconds.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def some_ids(model: PreTrainedModel, texts: int, tokens: int) -> torch.Tensor:
    """Tokens drawn by chance, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.config.vocab_size, (texts, tokens), generator=generator)


if __name__ == "__main__":
    main()
