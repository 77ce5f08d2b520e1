"""A base and a model that was fine-tuned from it, and what a delta has to make of the two."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import Tensors, pruned_by_rule


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


def less(
    base: Tensors,
    tuned: Tensors,
    targets: Collection[str],
    *,
    transposed: Collection[str] = (),
    granularity: str = "row",
    beta: float = 1.0,
) -> Tensors:
    """The pruned differences of targets."""
    differences = {
        name: (tuned[name].float() - base[name].float()).to(tuned[name].dtype) for name in targets
    }
    return pruned_by_rule(
        differences, targets, beta=beta, granularity=granularity, transposed=transposed
    )


def merged(base: Tensors, tuned: Tensors, targets: Collection[str], **rule: Any) -> Tensors:
    """The model that base and delta give; the rule is that of `less`."""
    kept = less(base, tuned, targets, **rule)
    sums = {name: (base[name].float() + kept[name].float()).to(kept[name].dtype) for name in kept}
    return {**tuned, **sums}
