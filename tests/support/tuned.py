"""A base and a model that was fine-tuned from it, and what a delta is to make of the two."""

import math
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file, save_file
from support.checkpoints import Tensors, kept_by_rule
from support.format_reader import read_packed


def tune(base: Path, folder: Path, *, changed: str = "", seed: int = 7) -> Path:
    """Copy a folder with its tensors changed a little: those whose names have `changed` in them."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    for path in sorted(base.iterdir()):
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
            continue
        tensors = load_file(path)
        for name, tensor in sorted(tensors.items()):
            noise = torch.randn(tensor.shape, generator=generator) ** 3 * 0.01
            if changed in name:
                tensors[name] = (tensor.float() + noise).to(tensor.dtype)
        save_file(tensors, folder / path.name)
    return folder


def merged(base: Tensors, tuned: Tensors, delta: Path) -> Tensors:
    """The model that a base and the differences in a delta's packed tensors give."""
    sums = {}
    for path in sorted(delta.glob("*.safetensors")):
        for name, patterns in read_packed(path).items():
            less = torch.from_numpy(patterns).view(tuned[name].dtype)
            sums[name] = (base[name].float() + less.float()).to(less.dtype)
    return {**tuned, **sums}


def uniform(name: str, index: int) -> float:
    """A number in (0, 1]: SplitMix64 of a weight's index in its tensor, from the name's hash on."""
    state = (xxhash.xxh3_64_intdigest(name.encode()) + index) * 0x9E3779B97F4A7C15 % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state = (state ^ state >> shift) * factor % 2**64
    return ((state ^ state >> 31) // 2**40 + 1) / 2**24


def sampled(name: str, weights: torch.Tensor, beta: float) -> torch.Tensor:
    """What priority sampling leaves of a matrix, float32 [rows, columns]."""
    result = torch.zeros_like(weights, dtype=torch.float32)
    for row, values in enumerate(weights.float().tolist()):
        columns = len(values)
        kept = int(kept_by_rule(np.abs(np.array(values, np.float64)), beta).sum())
        draws = [np.float32(uniform(name, row * columns + i)) for i in range(columns)]
        priorities = [np.float32(abs(v)) / u for v, u in zip(values, draws, strict=True)]
        tau = float(sorted(priorities, reverse=True)[kept]) if kept < columns else 0.0
        for i, (value, priority) in enumerate(zip(values, priorities, strict=True)):
            if priority > tau:
                result[row, i] = math.copysign(max(abs(value), tau), value)
    return result
