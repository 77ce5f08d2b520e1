"""Loads a model, lets it generate a text, and measures speed and memory."""

from __future__ import annotations

import time
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import torch

from emp_llm.errors import OptionError
from emp_llm.evaluation.model_loading import load_model
from emp_llm.generation.prompt import prompt_ids
from emp_llm.generation.results import Generated, weights_of
from emp_llm.generation.stream import Stream
from emp_llm.integration.configs import EmpConfig
from emp_llm.runtime.memory import peak_bytes, resident_bytes
from emp_llm.runtime.quiet import quiet_transformers
from emp_llm.texts.tokenizer import load_tokenizer
from emp_llm.texts.tokens import check_tokens, positions_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from transformers import PreTrainedModel

    from emp_llm.evaluation.found_model import Found
    from emp_llm.generation.listener import Listener
    from emp_llm.generation.options import GenerateOptions

__all__ = ["generate_with"]

_FIRST_PASS = 32
"""Tokens of the prompt that the first pass takes."""


def generate_with(
    found: Found, prompt: str, options: GenerateOptions, listener: Listener
) -> Generated:
    """Load a model and generate a text with it.

    Before the clock starts, the model has generated two tokens: a dense checkpoint is only mapped
    into memory when it is loaded, and kernels are compiled at their first call.

    Args:
        found: The model.
        prompt: What the text begins with.
        options: How it is generated.
        listener: Hears it.

    Raises:
        CheckpointError: As `load_model`, and if its chat template cannot be used.
        OptionError: If the prompt is empty or too long for the model, or a GPU has no room for it.
    """
    with _threads(options.threads), quiet_transformers():
        try:
            return _generate(found, prompt, options, listener)
        except torch.OutOfMemoryError as error:
            raise OptionError(
                f"{found.name}: the GPU's memory is too small for it: give a shorter prompt, fewer "
                "new tokens, another dtype, or the device cpu"
            ) from error


def _generate(found: Found, prompt: str, options: GenerateOptions, listener: Listener) -> Generated:
    import_module("transformers.generation.utils")  # 160 MB that are no model's
    bytes_before, start = resident_bytes(), time.perf_counter()
    tokenizer = load_tokenizer(
        found.name, found.source.folder, trust_remote_code=options.trust_remote_code
    )
    # first, for a prompt that cannot be used is told in a second, and a model loads for minutes
    ids = prompt_ids(found.name, tokenizer, prompt, chat=options.chat)
    model, _ = load_model(
        found,
        tokenizer=tokenizer,
        dtype=options.dtype,
        device=options.device,
        trust_remote_code=options.trust_remote_code,
        pruning=EmpConfig(keep_packed=True) if options.keep_packed else None,
    )
    embeddings = model.get_input_embeddings().get_parameter("weight").shape[0]
    check_tokens(ids, embeddings, "the prompt")
    most = min(options.max_new_tokens, _room(found.name, model, len(ids)))
    _new_ids(model, ids[:_FIRST_PASS], max_new_tokens=2, min_new_tokens=2, do_sample=False)
    load_seconds = time.perf_counter() - start
    listener.begin(found.name, weights_of(found, options))
    stream = Stream(tokenizer, listener)
    new = _new_ids(model, ids, streamer=stream, max_new_tokens=most, **_choice(options))
    footprint: Any = model.get_memory_footprint  # which has no types
    return Generated(
        model=found.name,
        revision=found.source.revision,
        weights=weights_of(found, options),
        weights_bytes=footprint(),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(_device(model)),
        threads=torch.get_num_threads(),
        prompt_ids=tuple(ids),
        new_ids=tuple(new),
        text=str(tokenizer.decode(new, skip_special_tokens=True)),
        ended=_end(len(new), most, options),
        load_seconds=load_seconds,
        first_seconds=stream.times[0],
        decode_seconds=stream.times[-1] - stream.times[0],
        bytes_before=bytes_before,
        resident_bytes=resident_bytes(),
        peak_bytes=peak_bytes(),
        gpu_peak_bytes=_gpu_peak_bytes(),
    )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Have torch use as many threads; afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _room(name: str, model: PreTrainedModel, prompt: int) -> int:
    """How many tokens the model has positions for after the prompt's."""
    positions = positions_of(model.config)
    if positions is None:
        return 1 << 30
    if prompt >= positions:
        raise OptionError(
            f"the prompt is {prompt} tokens long; {name} has {positions} positions: give a prompt "
            f"of {positions - 1} tokens or less"
        )
    return positions - prompt


def _choice(options: GenerateOptions) -> dict[str, Any]:
    """How `generate` chooses tokens; the model's own settings would draw them, or search beams."""
    if options.temperature == 0:
        return {"do_sample": False, "num_beams": 1}
    torch.manual_seed(options.seed)
    return {"do_sample": True, "num_beams": 1, "temperature": options.temperature}


def _new_ids(model: PreTrainedModel, ids: Sequence[int], **options: object) -> list[int]:
    """The tokens that a model generates after others."""
    ids_1n = torch.tensor([ids], device=_device(model))
    # typed as what a mixin of models has, which hides the method itself
    generate: Any = model.generate
    found: torch.Tensor = generate(
        input_ids=ids_1n, attention_mask=torch.ones_like(ids_1n), **options
    )
    new: list[int] = found[0, len(ids) :].tolist()
    return new


def _device(model: PreTrainedModel) -> torch.device:
    """Where the model takes its tokens; accelerate moves them if its weights are offloaded."""
    return torch.device("cpu") if model.device.type == "meta" else model.device


def _end(
    count: int, most: int, options: GenerateOptions
) -> Literal["text", "max_new_tokens", "positions"]:
    if count < most:
        return "text"
    return "max_new_tokens" if most == options.max_new_tokens else "positions"


def _gpu_peak_bytes() -> int | None:
    """The most that torch has held on all GPUs; None where none was used."""
    gpus = range(torch.cuda.device_count())
    return sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus) or None
