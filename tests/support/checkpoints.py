"""Small checkpoints made by hand, and what the rule leaves of them, worked out another way.

The rule here is a few lines of float64 on whole tensors; it shares nothing with the code it judges.
"""

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from emp_llm import CheckpointError, EmpError, PruneOptions, prune
from emp_llm.output.output_folder import STAGING_NAME

H, F = 12, 20
"""Hidden and intermediate size of the checkpoints made by hand."""

Tensors = dict[str, torch.Tensor]

DOWN, GATE, UP = (f"model.layers.0.mlp.{leaf}_proj.weight" for leaf in ("down", "gate", "up"))


def llama_config(hidden: int, intermediate: int, layers: int = 1) -> dict[str, object]:
    """The config.json of a Llama with gate and up [intermediate, hidden], down the other way."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 8,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "tie_word_embeddings": False,
    }


def write_checkpoint(folder: Path, config: Mapping[str, object], *shards: Tensors) -> Path:
    """Write a checkpoint: one file, or with several shards an index as well."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors")
        return folder
    weight_map = {}
    for i, tensors in enumerate(shards, start=1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / name)
        weight_map.update(dict.fromkeys(tensors, name))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def gaussian(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Gaussian weights."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def few_values(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Weights of which many are equal in magnitude, and some zero, of either sign."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-3, 4, shape, generator=generator) / 8
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return (values * signs).to(dtype)


def mlp(hidden: int, intermediate: int, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """The three matrices of one Llama MLP, Gaussian."""
    return {
        DOWN: gaussian(hidden, intermediate, dtype=dtype, seed=1),
        GATE: gaussian(intermediate, hidden, dtype=dtype, seed=2),
        UP: gaussian(intermediate, hidden, dtype=dtype, seed=3),
    }


def load(folder: Path) -> Tensors:
    """Every tensor of a folder, read by the safetensors library."""
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(path))
    return tensors


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """All that a tensor is, -0.0 told from 0.0."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), data


def differing(found: Tensors, expected: Tensors) -> list[str]:
    """Names that only one side has, or whose tensors are not the same to the bit."""
    return sorted(
        name
        for name in found.keys() | expected.keys()
        if name not in found or name not in expected or bits(found[name]) != bits(expected[name])
    )


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def kept_by_rule(scores: np.ndarray, beta: float) -> np.ndarray:
    """Which of one group's scores stay: bool [N] of float64 [N]."""
    s1, s2 = math.fsum(scores), math.fsum(scores * scores)
    count = 0
    if s2:
        count = min(scores.size, max(1, math.floor(beta * (s1 * s1 / s2) * (1 + 1e-9))))
    keep = np.zeros(scores.size, bool)
    keep[np.argsort(-scores, kind="stable")[:count]] = True
    return keep


def pruned_by_rule(
    tensors: Tensors,
    targets: Collection[str],
    *,
    beta: float,
    granularity: str,
    transposed: Collection[str] = (),
) -> Tensors:
    """What must be left of a checkpoint: targets with zeros in them, the others as they are."""
    rows = {
        name: tensors[name].mT if name in transposed else tensors[name] for name in sorted(targets)
    }
    scores = {name: rows[name].double().abs().numpy() for name in rows}
    if granularity == "model":
        parts = [part.reshape(-1) for part in scores.values()]
        keep = kept_by_rule(np.concatenate(parts), beta)
        pieces = np.split(keep, np.cumsum([part.size for part in parts])[:-1])
        masks = dict(zip(scores, pieces, strict=True))
    else:
        width = 1 if granularity == "row" else 2
        masks = {
            name: np.concatenate(
                [kept_by_rule(group, beta) for group in _groups(part, part.shape[-width:])]
            )
            for name, part in scores.items()
        }
    result = dict(tensors)
    for name, weights in rows.items():
        mask = torch.from_numpy(masks[name].reshape(weights.shape))
        left = torch.where(mask, weights, torch.zeros((), dtype=weights.dtype))
        result[name] = (left.mT if name in transposed else left).contiguous()
    return result


def _groups(scores: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return scores.reshape(-1, math.prod(shape))


def refusal(
    source: Path, out: Path, kind: type[EmpError] = CheckpointError, **options: object
) -> str:
    """The one line that prune refuses with; what is at `out` stays as it was.

    But for what it keeps, hidden, where the same command may succeed later.
    """
    overwrite = bool(options.pop("overwrite", False))
    before = files(out) if out.exists() else None
    with pytest.raises(kind) as caught:
        prune(source, out, PruneOptions(**options), overwrite=overwrite)
    if kept := kept_unfinished(out):
        assert caught.value.may_pass
        assert [note.split()[0] for note in caught.value.__notes__] == [f"{len(kept)}"]
    hidden = {name: data for name, data in (before or {}).items() if STAGING_NAME not in name}
    assert visible(out) == hidden
    assert out.exists() == (before is not None or bool(kept))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def visible(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but those of an unfinished run; none if there is no folder."""
    found = files(folder) if folder.exists() else {}
    return {name: data for name, data in found.items() if STAGING_NAME not in name}


def kept_unfinished(out: Path) -> list[str]:
    """The shards that a run which broke off has left for the next one; it left nothing else."""
    folder = out / STAGING_NAME
    if folder.is_symlink() or not folder.exists():
        return []
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    journal = [".run.json", *(f".finished/{name}.json" for name in shards)]
    assert sorted(files(folder)) == sorted([*journal, *shards])
    assert shards != []
    return shards
