"""Prune a real model in each dtype, granularity and β, and compare each weight with the reference.

    python benchmarks/check_model.py MODEL --text FILE [--context N] [--json FILE]

For copies of the model in bfloat16, float16 and float32, for each granularity and each β: prune,
verify, unpack, compare every tensor with the rule computed in float64 on the whole tensors, load
with `from_pretrained` and measure the perplexity on a text. It ends at the first difference.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path

import numpy as np
import torch
from emp_kernels import reference
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import emp_llm
from emp_llm.evaluation.perplexity import perplexity

BETAS = (0.5, 1.0, 1.5)
GRANULARITIES = ("row", "layer", "model")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

Tensors = Mapping[str, torch.Tensor]


def read(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint of one or more files."""
    return {
        k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()
    }


def groups(tensors: Tensors, granularity: str) -> Iterator[list[tuple[str, int | slice]]]:
    """The groups of scores that are ranked together: each a list of (tensor, row or all rows)."""
    if granularity == "row":
        yield from ([(name, row)] for name, t in tensors.items() for row in range(len(t)))
    elif granularity == "layer":
        yield from ([(name, slice(None))] for name in tensors)
    else:
        yield [(name, slice(None)) for name in sorted(tensors)]


def expected(tensors: Tensors, granularity: str, beta: float) -> dict[str, torch.Tensor]:
    """The pruned tensors by the reference; all are weights of nn.Linear, [out, in]."""
    result = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    for group in groups(tensors, granularity):
        parts = [tensors[name][rows] for name, rows in group]
        scores = np.concatenate([part.double().abs().numpy().ravel() for part in parts])
        mask = torch.from_numpy(reference.keep_mask(scores, beta))
        for (name, rows), part in zip(group, parts, strict=True):
            keep, mask = mask[: part.numel()].reshape(part.shape), mask[part.numel() :]
            result[name][rows] = torch.where(keep, part, torch.zeros_like(part))
    return result


def compare(found: Tensors, dense: Tensors, pruned: Tensors) -> None:
    """Check that every bit is the expected one."""
    assert found.keys() == dense.keys()
    for name, tensor in found.items():
        wanted = pruned.get(name, dense[name])
        assert tensor.dtype == wanted.dtype, name
        assert torch.equal(tensor.view(torch.uint8), wanted.view(torch.uint8)), name


def measure(folder: Path, text: str, context: int) -> float:
    """Perplexity of a dense checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return perplexity(
        model, AutoTokenizer.from_pretrained(folder), text, context=context
    ).perplexity


def copy_of(model: str, dtype: torch.dtype, folder: Path) -> Path:
    """Save a copy of the model in a dtype."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    loaded.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def check(source: Path, work: Path, granularity: str, beta: float) -> tuple[dict, Path]:
    """Prune with these options and compare; returns the report and the unpacked folder."""
    options = emp_llm.PruneOptions(beta=beta, granularity=granularity)
    report = emp_llm.prune(source, work / "packed", options, overwrite=True)
    emp_llm.verify(work / "packed")
    emp_llm.unpack(work / "packed", work / "dense", overwrite=True)
    dense = read(source)
    targets = {name: dense[name] for name, t in report["tensors"].items() if t["pruned"]}
    compare(read(work / "dense"), dense, expected(targets, granularity, beta))
    return report, work / "dense"


def main() -> None:
    """Run all checks and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model")
    parser.add_argument("--text", type=Path, required=True, help="text to measure perplexity on")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--json", type=Path, help="write the results there too")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    text = arguments.text.read_text(encoding="utf-8")
    results = []
    print("dtype granularity  beta  sparsity  targets  model  perplexity")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for dtype_name, dtype in DTYPES.items():
            source = copy_of(arguments.model, dtype, work / dtype_name)
            print(f"{dtype_name:5} {'dense':<40}{measure(source, text, arguments.context):12.2f}")
            for granularity, beta in product(GRANULARITIES, BETAS):
                report, dense = check(source, work, granularity, beta)
                targets, model = report["totals"]["targets"], report["totals"]["model"]
                value = measure(dense, text, arguments.context)
                print(
                    f"{dtype_name:5} {granularity:11} {beta:5}  {targets['sparsity']:8.2%}  "
                    f"{targets['bytes_ratio']:7.3f}  {model['bytes_ratio']:5.3f}  {value:10.2f}",
                    flush=True,
                )
                results.append(
                    {"dtype": dtype_name, "granularity": granularity, "beta": beta}
                    | {"perplexity": value, "targets": targets, "model": model}
                )
    print(f"{len(results)} runs: every weight is the reference's")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
