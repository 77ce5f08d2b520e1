"""Tiny mixtures of experts of many architectures, and what they compute without some experts."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from unittest.mock import patch

import torch
import transformers
from support.architectures import F, H, V, make_model, make_of

EXPERTS = 6
"""Experts in a layer: no other dimension of these models has that size."""

_BASE = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": F,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
}
_ROUTED = {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "moe_intermediate_size": 8}

_MORE = {
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig", {**_BASE, "num_experts": EXPERTS}),
    "granite-moe": (
        "GraniteMoeForCausalLM",
        "GraniteMoeConfig",
        {**_BASE, "num_local_experts": EXPERTS},
    ),
    "phi-moe": ("PhimoeForCausalLM", "PhimoeConfig", {**_BASE, "num_local_experts": EXPERTS}),
    "ernie": (
        "Ernie4_5_MoeForCausalLM",
        "Ernie4_5_MoeConfig",
        {
            **_BASE,
            "moe_num_experts": EXPERTS,
            "moe_k": 2,
            "moe_intermediate_size": 8,
            "moe_layer_start_index": 1,
        },
    ),
    "dots1": ("Dots1ForCausalLM", "Dots1Config", {**_BASE, **_ROUTED, "first_k_dense_replace": 1}),
    "glm4-moe": (
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        {**_BASE, **_ROUTED, "first_k_dense_replace": 1},
    ),
}

MIXTURES: Mapping[str, Mapping[str, int]] = {
    "mixtral": {"num_local_experts": EXPERTS},
    "qwen2-moe": {"num_experts": EXPERTS},
    "qwen3-moe": {"num_experts": EXPERTS},
    "olmoe": {},
    "deepseek-v2": {"n_routed_experts": EXPERTS, "topk_method": "group_limited_greedy"},
    "deepseek-v3": {"n_routed_experts": EXPERTS},
    "gpt-oss": {"num_local_experts": EXPERTS},
    "granite-moe": {},
    "phi-moe": {},
    "ernie": {},
    "dots1": {},
    "glm4-moe": {},
    "llama4": {"num_local_experts": EXPERTS},
    "jamba": {"num_experts": EXPERTS},
}
"""What makes a mixture of `EXPERTS` experts of each architecture."""

GROUPED = ("deepseek-v2", "deepseek-v3")
"""Those that route within two groups: experts 0 to 2, and 3 to 5."""


def make_mixture(architecture: str, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """A tiny mixture of experts, whose routers tell tokens apart."""
    if architecture in _MORE:
        model = make_of(*_MORE[architecture], dtype=dtype)
    else:
        model = make_model(architecture, dtype=dtype, **MIXTURES[architecture])
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.shape[-2:] == (EXPERTS, H):
                tensor.mul_(20)
            elif name.endswith("e_score_correction_bias"):
                tensor.copy_(torch.linspace(0, 0.1, EXPERTS).expand_as(tensor))
    return model


def layers_with_experts(model: transformers.PreTrainedModel) -> list[int]:
    """The numbers of the decoder blocks that have experts."""
    found = [
        int(name.split(".")[2])
        for name, tensor in model.state_dict().items()
        if tensor.shape[-2:] == (EXPERTS, H)
    ]
    return sorted(set(found))


@contextmanager
def routed_among(
    model: transformers.PreTrainedModel, kept: Mapping[int, tuple[int, ...]]
) -> Iterator[None]:
    """Give the logit −inf to all experts but some, whenever the model is run.

    Args:
        model: The model.
        kept: Those that tokens are still routed to, for each layer that has experts.
    """
    gone = {layer: [e for e in range(EXPERTS) if e not in stays] for layer, stays in kept.items()}
    biases = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.endswith("e_score_correction_bias")
    }
    for name, bias in biases.items():
        bias[..., gone[int(name.split(".")[2])]] = -torch.inf
    linear, calls = torch.nn.functional.linear, [0]

    def masked(inputs: torch.Tensor, weight: torch.Tensor, bias=None) -> torch.Tensor:
        output = linear(inputs, weight, bias)
        if tuple(weight.shape) == (EXPERTS, H):
            layer = sorted(gone)[calls[0] % len(gone)]
            calls[0] += 1
            output[..., gone[layer]] = -torch.inf
        return output

    with patch("torch.nn.functional.linear", masked):
        yield
    assert calls[0]
    assert calls[0] % len(gone) == 0
