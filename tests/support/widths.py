"""Tiny models of many architectures, several groups of heads each, and their masked logits."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

NEURONS, GROUPS, HEADS, SIZE = 40, 3, 6, 8
"""Neurons of an MLP; groups of heads, heads, and the dimensions of a head."""

_BASE = {
    "vocab_size": 32,
    "hidden_size": 24,
    "intermediate_size": NEURONS,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": SIZE,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**_BASE, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", _BASE),
    "qwen2": ("Qwen2", _BASE),
    "qwen3": ("Qwen3", _BASE),
    "gemma2": ("Gemma2", {**_BASE, "tie_word_embeddings": True, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3", _BASE),
    "granite": ("Granite", _BASE),
    "cohere": ("Cohere", {**_BASE, "tie_word_embeddings": True}),
    "olmo2": ("Olmo2", _BASE),
    "smollm3": ("SmolLM3", _BASE),
    "glm4": ("Glm4", _BASE),
    "starcoder2": ("Starcoder2", _BASE),
    "gpt-oss": ("GptOss", {**_BASE, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("Qwen3Moe", {**_BASE, **_ROUTED, "mlp_only_layers": [0]}),
    "opt": (
        "OPT",
        {
            "vocab_size": 32,
            "hidden_size": 24,
            "ffn_dim": NEURONS,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 24,
            "pad_token_id": 0,
        },
    ),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": 32,
            "n_embd": 24,
            "n_inner": NEURONS,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
}

WITH_NEURONS = tuple(name for name in MODELS if name != "gpt-oss")
WITH_GROUPS = tuple(name for name in MODELS if name not in ("olmo2", "opt", "gpt2"))

_DOWN = ("mlp.down_proj", "mlp.c_proj", "fc2")
_OUT = ("self_attn.o_proj",)


def make(
    architecture: str, dtype: torch.dtype = torch.float32, **options: Any
) -> transformers.PreTrainedModel:
    """A model with random weights, biases, norms and sinks too; options change its config."""
    name, arguments = MODELS[architecture]
    torch.manual_seed(11)
    config = getattr(transformers, f"{name}Config")(**{**arguments, **options})
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    model = getattr(transformers, name + suffix)(config)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape)
        parameter.data = (parameter.data * (1 + 0.3 * noise) + 0.1 * noise).to(dtype)
    for buffer_name, buffer in model.named_buffers():
        if buffer.is_floating_point() and "inv_freq" not in buffer_name:
            buffer.data = buffer.data.to(dtype)
    model.config.dtype = dtype
    return model.eval()


def mask(model: transformers.PreTrainedModel, kept: Mapping[int, Sequence[int]], kind: str) -> None:
    """Have what reads the structures of some layers get nothing from all others."""
    names, number = (_DOWN, NEURONS) if kind == "neurons" else (_OUT, GROUPS)
    readers = [module for name, module in model.named_modules() if name.endswith(names)]
    for layer, stays in kept.items():
        weight = readers[layer].weight.data
        columns = weight if type(readers[layer]).__name__ == "Conv1D" else weight.T
        gone = [one for one in range(number) if one not in stays]
        columns.view(number, -1, columns.shape[1])[gone] = 0
