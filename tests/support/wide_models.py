"""Tiny models of which embeddings, and some layers more, are large enough to be packed whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.architectures import save_tiny_model
from support.checkpoints import DOWN, GATE, UP, Tensors, gaussian, llama_config, mlp

WideModel = Callable[..., Path]

WIDE: dict[str, dict[str, Any]] = {
    "llama": {"vocab_size": 512, "hidden_size": 64, "head_dim": 256},
    "llama-tied": {"vocab_size": 512, "hidden_size": 64, "head_dim": 256},
    "gpt2": {"vocab_size": 512, "n_embd": 128, "n_inner": 256},
    "mixtral": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 512, "head_dim": 8},
    "t5": {"vocab_size": 512, "d_model": 64, "d_kv": 256, "d_ff": 32},
    "bert": {"vocab_size": 512, "hidden_size": 192, "intermediate_size": 32},
}

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q, K = (f"model.layers.0.self_attn.{leaf}_proj.weight" for leaf in "qk")
NORM = "model.norm.weight"
TARGETS = (DOWN, GATE, UP)

REST_CONFIG = {
    **llama_config(64, 96),
    "vocab_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
}
"""The config of `with_rest`."""

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def save_wide_model(folder: Path, architecture: str, **options: Any) -> Path:
    """Write such a model; see `save_tiny_model`."""
    return save_tiny_model(folder, architecture, **{**WIDE[architecture], **options})


def large(tensors: Tensors) -> set[str]:
    """Names of the tensors that are packed if they are not pruned."""
    return {
        name
        for name, tensor in tensors.items()
        if tensor.dtype in _FLOATS and tensor.ndim > 1 and tensor.nbytes >= 65_536
    }


def planes_of(names: set[str]) -> set[str]:
    """Names of the planes that packed tensors have."""
    return {name + suffix for name in names for suffix in ("", ".emp_rows", ".emp_meta")}


def with_rest(dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """One Llama layer with hidden size 64, and what is packed beside it: EMBED and Q.

    HEAD is noise, which packing does not make smaller; K is too small.
    """
    return {
        **mlp(64, 96, dtype),
        EMBED: gaussian(512, 64, dtype=dtype, seed=5),
        Q: gaussian(512, 64, dtype=dtype, seed=6) / 8,
        HEAD: noise(512, 64, dtype),
        K: gaussian(128, 64, dtype=dtype, seed=7),
        NORM: gaussian(64, dtype=dtype, seed=8),
    }


def noise(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Weights of any bits whatever."""
    generator = torch.Generator().manual_seed(9)
    count = rows * columns * dtype.itemsize
    data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(rows, columns)


def with_odd_values(tensor: torch.Tensor) -> torch.Tensor:
    """A bfloat16 tensor of which some items are NaN of several kinds, infinite or -0.0."""
    result = tensor.clone()
    result[0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    result.view(torch.int16)[1, :3] = torch.tensor([-1, 0x7F81, -0x8000], dtype=torch.int16)
    result[2] = -0.0
    return result
