"""Tiny Llamas in Meta's original format, and Meta's model written down for them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from support.checkpoints import Tensors, gaussian
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

DIM, HEADS, LAYERS, F, V = 32, 8, 2, 48, 40
HALF = DIM // HEADS // 2

COLUMNS = ("attention.wo", "feed_forward.w2")  # of these a part holds some columns
NORMS = ("norm",)  # of these every part holds all


def params(kv_heads: int | None = None, **more: object) -> dict[str, Any]:
    fields = {"dim": DIM, "n_layers": LAYERS, "n_heads": HEADS, "norm_eps": 1e-5, "vocab_size": -1}
    return {**fields, **({} if kv_heads is None else {"n_kv_heads": kv_heads}), **more}


def whole_model(kv_heads: int = HEADS, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """All tensors under Meta's names, in one part."""
    keys = kv_heads * DIM // HEADS
    shapes: dict[str, tuple[int, ...]] = {"tok_embeddings": (V, DIM), "output": (V, DIM)}
    for layer in range(LAYERS):
        shapes |= {
            f"layers.{layer}.attention.wq": (DIM, DIM),
            f"layers.{layer}.attention.wk": (keys, DIM),
            f"layers.{layer}.attention.wv": (keys, DIM),
            f"layers.{layer}.attention.wo": (DIM, DIM),
            f"layers.{layer}.feed_forward.w1": (F, DIM),
            f"layers.{layer}.feed_forward.w2": (DIM, F),
            f"layers.{layer}.feed_forward.w3": (F, DIM),
            f"layers.{layer}.attention_norm": (DIM,),
            f"layers.{layer}.ffn_norm": (DIM,),
        }
    shapes["norm"] = (DIM,)
    tensors = {
        f"{name}.weight": gaussian(*shape, dtype=dtype, seed=seed)
        for seed, (name, shape) in enumerate(shapes.items())
    }
    return {**tensors, "rope.freqs": torch.ones(HALF)}


def split(tensors: Tensors, count: int, *, embedding_axis: int = 1) -> list[Tensors]:
    """The parts that model parallelism makes of a model."""

    def part(name: str, number: int) -> torch.Tensor:
        layer = name.removesuffix(".weight")
        if layer.endswith("norm") or name == "rope.freqs":
            return tensors[name].clone()
        axis = int(layer.endswith(COLUMNS))
        axis = embedding_axis if layer == "tok_embeddings" else axis
        return tensors[name].chunk(count, axis)[number].clone()

    return [{name: part(name, number) for name in tensors} for number in range(count)]


def write_original(
    folder: Path, fields: Mapping[str, Any], *parts: Tensors, zipped: bool = True
) -> Path:
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(fields))
    for number, tensors in enumerate(parts):
        path = folder / f"consolidated.{number:02}.pth"
        torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
    return folder


def meta_logits(
    tensors: Tensors, tokens: torch.Tensor, kv_heads: int, theta: float
) -> torch.Tensor:
    """What the model predicts, [T, V], by Meta's own code: neighbours are turned as pairs."""
    w = {name.removesuffix(".weight"): tensor.float() for name, tensor in tensors.items()}
    count, size = len(tokens), 2 * HALF
    frequencies = theta ** (-torch.arange(0, size, 2).double() / size)
    angles = torch.outer(torch.arange(count).double(), frequencies)
    turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)[:, None]

    def heads(name: str, x: torch.Tensor, number: int) -> torch.Tensor:
        return (x @ w[name].T).view(count, number, size)

    def turned(x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(count, -1, HALF, 2))
        return torch.view_as_real(pairs * turns).flatten(2)

    x = w["tok_embeddings"][tokens]
    for layer in range(LAYERS):
        at, ff = f"layers.{layer}.attention", f"layers.{layer}.feed_forward"
        y = rms_norm(x, (DIM,), w[f"{at}_norm"], 1e-5)
        q, k = turned(heads(f"{at}.wq", y, HEADS)), turned(heads(f"{at}.wk", y, kv_heads))
        v = heads(f"{at}.wv", y, kv_heads)
        k, v = (part.repeat_interleave(HEADS // kv_heads, 1) for part in (k, v))
        q, k, v = (part.transpose(0, 1) for part in (q, k, v))
        seen = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + seen.transpose(0, 1).flatten(1) @ w[f"{at}.wo"].T
        y = rms_norm(x, (DIM,), w[f"layers.{layer}.ffn_norm"], 1e-5)
        x = x + (silu(y @ w[f"{ff}.w1"].T) * (y @ w[f"{ff}.w3"].T)) @ w[f"{ff}.w2"].T
    return rms_norm(x, (DIM,), w["norm"], 1e-5) @ w["output"].T
