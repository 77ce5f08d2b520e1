"""Tiny models of many architectures, as other tests need them: random weights, Hub layout."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

H, F, V, LAYERS = 16, 24, 32, 2  # hidden size, MLP size, vocabulary, layers

_BASE = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": F,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_DECODER = {**_BASE, "num_key_value_heads": 1, "head_dim": 8}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_DEEPSEEK = {
    **_BASE,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
_BERT = {key: value for key, value in _BASE.items() if key != "tie_word_embeddings"}

# name: (class of the model, class of its config, arguments of that config)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**_DECODER, "tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", "MistralConfig", _DECODER),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _DECODER),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _DECODER),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", {**_DECODER, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**_DECODER, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**_DECODER, "tie_word_embeddings": True}),
    "phi": ("PhiForCausalLM", "PhiConfig", {**_BASE, "partial_rotary_factor": 0.5}),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", _DECODER),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": V,
            "n_embd": H,
            "n_inner": F,
            "n_layer": LAYERS,
            "n_head": 2,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", _BASE),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {**_BERT, "ffn_dim": F, "word_embed_proj_dim": H, "tie_word_embeddings": True},
    ),
    "falcon": ("FalconForCausalLM", "FalconConfig", {**_BASE, "ffn_hidden_size": F}),
    "bert": ("BertForMaskedLM", "BertConfig", _BERT),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", _BERT),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": V,
            "d_model": H,
            "d_kv": 8,
            "d_ff": F,
            "num_layers": 1,
            "num_heads": 2,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "decoder_start_token_id": 0,
        },
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_DECODER, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen2-moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**_DECODER, **_MOE, "shared_expert_intermediate_size": F, "mlp_only_layers": [0]},
    ),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_DECODER, **_MOE}),
    "deepseek-v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", _DEEPSEEK),
    "deepseek-v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", _DEEPSEEK),
    "gpt-oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **_DECODER,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {**_DECODER, "intermediate_size_mlp": F, "num_local_experts": 4, "moe_layers": [1]},
    ),
    "jamba": (
        "JambaForCausalLM",
        "JambaConfig",
        {
            **_BASE,
            "num_key_value_heads": 1,
            "num_experts": 4,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 2,
        },
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "text_config": {"model_type": "llama", **_DECODER},
            "vision_config": {
                "model_type": "clip_vision_model",
                "hidden_size": H,
                "intermediate_size": F,
                "num_hidden_layers": LAYERS,
                "num_attention_heads": 2,
                "image_size": 8,
                "patch_size": 4,
                "projection_dim": H,
            },
            "image_token_index": 3,
            "tie_word_embeddings": False,
        },
    ),
}


def make_model(
    architecture: str, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **overrides: Any
) -> transformers.PreTrainedModel:
    """Make a tiny model; its weights depend on the seed and the dtype only.

    Args:
        architecture: A key of `ARCHITECTURES`.
        dtype: Of all parameters.
        seed: Of the weights, all of them Gaussian.
        overrides: Arguments of the config to replace or add.
    """
    model_class, config_class, arguments = ARCHITECTURES[architecture]
    return make_of(model_class, config_class, {**arguments, **overrides}, dtype=dtype, seed=seed)


def make_of(
    model_class: str,
    config_class: str,
    arguments: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    seed: int = 0,
) -> transformers.PreTrainedModel:
    """Make a tiny model of classes of transformers, as `make_model` does."""
    config = getattr(transformers, config_class)(**arguments)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, model_class)(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    return model.to(dtype).eval()


def save_tiny_model(
    folder: Path,
    architecture: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    max_shard_size: int | str = "5GB",
    **overrides: Any,
) -> Path:
    """Write a tiny model with the names that checkpoints on the Hub have.

    Args:
        folder: Where to; made if need be.
        max_shard_size: Bytes in a file at most; a small number makes many shards and an index.
        architecture, dtype, seed, overrides: See `make_model`.

    Returns:
        The folder.
    """
    model = make_model(architecture, dtype=dtype, seed=seed, **overrides)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def read_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Read name, safetensors dtype and shape of each tensor off the headers in a folder."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        header.pop("__metadata__", None)
        tensors.update({name: (it["dtype"], tuple(it["shape"])) for name, it in header.items()})
    return tensors


def with_config(tmp_path, folder, **changes):
    """Copy a folder's config with changes; a key set to None is left out."""
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    config = {key: value for key, value in config.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def pruned(decisions):
    """The names that a mapping of decisions prunes."""
    return {name for name, decision in decisions.items() if decision.prune}
