"""Redo the table of the EMP paper for any model: dense, Wanda, magnitude, and EMP on both scores.

    python benchmarks/paper_table.py MODEL [--text TEXT] [--calibration TEXT] [--json FILE]

As the authors did it: the MLPs' linear layers are pruned row by row; Wanda's scores are |w| · ‖x‖₂,
the norms of a layer's inputs taken in one pass of the dense model over 128 sequences of 512 tokens
from the beginning of WikiText-2's training text; perplexity of its test text in windows of 2048.
Where the paper has the model, its numbers stand beside ours.

The whole model is in memory, and a copy of the layers that are pruned.
"""

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import print_table, say, write_json
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from emp_llm.evaluation.perplexity import perplexity
from emp_llm.rule import keep_mask
from emp_llm.structure.places import find_places
from emp_llm.texts.texts import read_text

METHODS = {
    "dense": "dense",
    "wanda": "Wanda 50 %",
    "magnitude": "magnitude 50 %",
    "emp-wanda": "EMP-Wanda",
    "emp-magnitude": "EMP-magnitude",
}

# Perplexity and sparsity of the MLPs in percent, in the order of METHODS, from slurm/logs in
# https://github.com/noMushroomw/Effective-model-pruning (commit d242c82), block size 2048, bf16.
AUTHORS = {
    "huggyllama/llama-7b": (
        *((5.679, 0), (6.644, 50), (11.002, 50)),
        *((6.362, 40.60), (6.904, 36.66)),
    ),
    "huggyllama/llama-13b": (
        *((5.090, 0), (5.836, 50), (11.587, 50)),
        *((5.907, 40.68), (6.666, 36.58)),
    ),
    "huggyllama/llama-30b": (
        *((4.101, 0), (4.890, 50), (5.553, 50)),
        *((4.687, 40.18), (4.511, 36.60)),
    ),
    "huggyllama/llama-65b": (
        *((3.531, 0), (4.267, 50), (4.724, 50)),
        *((4.060, 39.99), (3.865, 36.61)),
    ),
    "meta-llama/Llama-2-7b-hf": (
        *((5.470, 0), (6.410, 50), (9.712, 50)),
        *((6.513, 41.07), (6.561, 36.70)),
    ),
    "meta-llama/Llama-2-13b-hf": (
        *((4.881, 0), (5.591, 50), (5.850, 50)),
        *((5.468, 40.48), (5.162, 36.62)),
    ),
    "meta-llama/Llama-2-70b-hf": (
        *((3.319, 0), (4.026, 50), (4.514, 50)),
        *((3.821, 40.32), (3.662, 36.66)),
    ),
}

_ROWS_AT_A_TIME = 1024

Weights = dict[str, torch.Tensor]


def mlp_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The linear layers inside decoder blocks and outside attention: the default targets."""
    places = {
        name: place
        for name, place in find_places(model).items()
        if place.why_not is None and place.block and not place.attention
    }
    for name, place in places.items():
        if not name.endswith(".weight") or place.shape is None or len(place.shape) != 2:
            raise SystemExit(
                f"{name!r} holds fused experts, whose inputs no hook sees: give a model without"
            )
    if not places:
        raise SystemExit("this model has no linear layers outside attention: give another one")
    return {name: model.get_submodule(name.removesuffix(".weight")) for name in places}


def rows(layer: nn.Module) -> torch.Tensor:
    """A layer's weights, [out, in]; a view, so that what is written there is in the layer."""
    weight = layer.weight.data
    return weight if isinstance(layer, nn.Linear) else weight.T  # GPT-2's Conv1D lies [in, out]


def input_norms(
    model: PreTrainedModel, layers: dict[str, nn.Module], sequences: list[list[int]]
) -> Weights:
    """‖x‖₂ of each input of each layer over all tokens, float32 [in], by the dense model."""
    squares = {
        name: torch.zeros(rows(layer).shape[1], dtype=torch.float64, device=layer.weight.device)
        for name, layer in layers.items()
    }

    def add(name: str, _layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].detach().flatten(0, -2).float()
        squares[name] += x.square().sum(dim=0)

    with ExitStack() as hooks, torch.inference_mode():
        for name, layer in layers.items():
            hook = layer.register_forward_pre_hook(partial(add, name))
            hooks.callback(hook.remove)
        for sequence in sequences:
            model(input_ids=torch.tensor([sequence], device=model.device), use_cache=False)
    return {name: total.sqrt().float() for name, total in squares.items()}


def half_mask(scores_RC: torch.Tensor) -> torch.Tensor:
    """All of each row but the lower half; of equal scores the first ones stay."""
    kept = scores_RC.shape[1] - scores_RC.shape[1] // 2
    order = scores_RC.sort(dim=1, descending=True, stable=True).indices[:, :kept]
    return torch.zeros_like(scores_RC, dtype=torch.bool).scatter_(1, order, value=True)


def prune(layer: nn.Module, method: str, norms: torch.Tensor) -> int:
    """Prune a layer in place; returns how many weights stay."""
    kept = 0
    for weights_RC in rows(layer).split(_ROWS_AT_A_TIME):
        scores_RC = weights_RC.float().abs()
        if method.endswith("wanda"):
            scores_RC *= norms
        mask_RC = keep_mask(scores_RC) if method.startswith("emp") else half_mask(scores_RC)
        weights_RC.masked_fill_(~mask_RC, 0)
        kept += int(mask_RC.sum())
    return kept


def sequences(
    tokenizer: PreTrainedTokenizerBase, text: str, count: int, length: int
) -> list[list[int]]:
    """The first full sequences of a text."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    return [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)][:count]


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The table's rows, one by one; the model is pruned and put back."""
    text = read_text(arguments.text, protocol="paper")
    calibration = read_text(arguments.calibration, protocol="paper")
    layers = mlp_layers(model)
    originals = {name: layer.weight.data.clone() for name, layer in layers.items()}
    weights = sum(weight.numel() for weight in originals.values())
    parts = sequences(tokenizer, calibration.text, arguments.samples, arguments.length)
    say(f"calibrating on {len(parts)} sequences of {arguments.length} tokens")
    norms = input_norms(model, layers, parts)
    for method in METHODS:
        kept = weights
        if method != "dense":
            kept = sum(prune(layer, method, norms[name]) for name, layer in layers.items())
        say(f"{method}: {kept / weights:.2%} of {weights:,} weights stay")
        found = perplexity(model, tokenizer, text, context=arguments.context)
        yield {
            "method": method,
            "weights": weights,
            "kept": kept,
            "sparsity": 1 - kept / weights,
            "perplexity": found.perplexity,
        }
        for name, layer in layers.items():
            layer.weight.data.copy_(originals[name])


def table(model: str, results: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """The table for people; the authors' columns are empty where the model is none of theirs."""
    theirs = {name.lower(): numbers for name, numbers in AUTHORS.items()}.get(model.lower())
    header = ("", "sparsity", "perplexity", "theirs:", "sparsity", "perplexity")
    lines = [header if theirs else header[:3]]
    for number, result in enumerate(results):
        ours = (
            METHODS[result["method"]],
            f"{result['sparsity']:.2%}",
            f"{result['perplexity']:.3f}",
        )
        if theirs:
            value, sparsity = theirs[number]
            ours += ("", f"{sparsity:.2f}%", f"{value:.3f}")
        lines.append(ours)
    return lines


def main() -> None:
    """Measure, print the table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("--text", default="wikitext2", help="what the models predict")
    parser.add_argument(
        "--calibration",
        default="Salesforce/wikitext:wikitext-2-raw-v1:train",
        help="what the inputs of layers are taken from",
    )
    parser.add_argument("--samples", type=int, default=128, help="sequences to calibrate on")
    parser.add_argument("--length", type=int, default=512, help="tokens in each of them")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16", help="the authors' is bfloat16")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, help="write the results there too")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=arguments.dtype, device_map=arguments.device
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    results = list(measure(model, tokenizer, arguments))
    print_table(table(arguments.model, results))
    if arguments.json:
        settings = {
            "model": Path(arguments.model).name,
            "text": Path(arguments.text).name,
            "calibration": Path(arguments.calibration).name,
            **{
                name: getattr(arguments, name) for name in ("samples", "length", "context", "dtype")
            },
        }
        write_json(arguments.json, "paper_table", settings, {"rows": results})


if __name__ == "__main__":
    main()
