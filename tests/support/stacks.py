"""Tiny models whose decoder blocks are of several kinds, and the same with blocks bypassed."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from support.architectures import _DECODER, ARCHITECTURES, F, H, V, make_model, make_of
from transformers import PreTrainedModel

BLOCKS = 6

_WINDOW = {"num_hidden_layers": BLOCKS, "sliding_window": 4}

STACKS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("model.layers", {"num_hidden_layers": BLOCKS}),
    "llama-tied": ("model.layers", {"num_hidden_layers": BLOCKS}),
    "mistral": ("model.layers", _WINDOW),
    "qwen2": ("model.layers", {**_WINDOW, "use_sliding_window": True, "max_window_layers": 2}),
    "qwen3": ("model.layers", {"num_hidden_layers": BLOCKS}),
    "gemma2": ("model.layers", _WINDOW),
    "gemma3": ("model.layers", _WINDOW),
    "phi3": ("model.layers", {"num_hidden_layers": BLOCKS}),
    "gpt2": ("transformer.h", {"n_layer": BLOCKS}),
    "gpt-neox": ("gpt_neox.layers", {"num_hidden_layers": BLOCKS}),
    "opt": ("model.decoder.layers", {"num_hidden_layers": BLOCKS}),
    "falcon": ("transformer.h", {"num_hidden_layers": BLOCKS}),
    "mixtral": ("model.layers", {"num_hidden_layers": BLOCKS}),
    "qwen2-moe": (
        "model.layers",
        {"num_hidden_layers": BLOCKS, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    ),
    "deepseek-v3": ("model.layers", {"num_hidden_layers": BLOCKS, "first_k_dense_replace": 3}),
    "gpt-oss": ("model.layers", _WINDOW),
    "llama4": ("model.layers", {"num_hidden_layers": BLOCKS, "moe_layers": [1, 3, 4]}),
    "llava": (
        "model.language_model.layers",
        {"text_config": {"model_type": "llama", **_DECODER, "num_hidden_layers": BLOCKS}},
    ),
    "smollm3": ("model.layers", {}),
    "gpt-neo": ("transformer.h", {}),
    "cohere2": ("model.layers", {}),
    "ernie": ("model.layers", {}),
    "recurrent-gemma": ("model.layers", {}),
}
"""By architecture, the name of the list of blocks, and what to change of the tiny config."""

_OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "smollm3": (
        "SmolLM3ForCausalLM",
        "SmolLM3Config",
        {**_DECODER, **_WINDOW, "use_sliding_window": True, "tie_word_embeddings": True},
    ),
    "cohere2": (
        "Cohere2ForCausalLM",
        "Cohere2Config",
        {**_DECODER, **_WINDOW, "tie_word_embeddings": True},
    ),
    "ernie": (
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {
            **_DECODER,
            "num_hidden_layers": BLOCKS,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 8,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 4,
        },
    ),
    "recurrent-gemma": (
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {
            **_DECODER,
            "num_hidden_layers": BLOCKS,
            "lru_width": H,
            "attention_window_size": 4,
            "block_types": ["recurrent", "recurrent", "attention"],
            "tie_word_embeddings": True,
        },
    ),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "vocab_size": V,
            "hidden_size": H,
            "intermediate_size": F,
            "num_layers": BLOCKS,
            "num_heads": 2,
            "attention_types": [[["global", "local", "local"], 2]],
            "window_size": 4,
            "max_position_embeddings": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}


def make_stack(architecture: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny model of `STACKS`."""
    if architecture in ARCHITECTURES:
        return make_model(architecture, dtype=dtype, **STACKS[architecture][1])
    return make_of(*_OTHERS[architecture], dtype=dtype)


@contextmanager
def bypassed(model: PreTrainedModel, architecture: str, kept: Collection[int]) -> Iterator[None]:
    """Within this ``with`` statement, the other blocks return what they are given."""
    blocks = model.get_submodule(STACKS[architecture][0])
    others = [block for number, block in enumerate(blocks) if number not in kept]
    tuples = architecture in ("falcon", "gpt-neo")
    for block in others:
        block.forward = lambda hidden, *_, **__: (hidden, None) if tuples else hidden
    yield
    for block in others:
        del block.forward
