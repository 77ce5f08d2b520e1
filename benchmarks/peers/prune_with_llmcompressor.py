"""Prunes the MLPs of a model with llm-compressor's SparseGPT or Wanda, and writes it dense.

    .venv/peers/bin/python benchmarks/peers/prune_with_llmcompressor.py MODEL SAMPLES \
        --method sparsegpt --sparsity 0.3761 --out DIR --json result.json

It runs in a virtual environment of its own (`make peers`), which has no emp-llm. SAMPLES is what
take_samples.py wrote. Every matrix gets the same sparsity; all else is as llm-compressor has it by
default, one sample at a time. The result is the sparsity that was reached, and what llm-compressor
took from its first step to its last: seconds, processor seconds and the peak of resident memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

METHODS = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}
TARGETS = r"re:.*\.mlp\..*_proj$"
PACKAGES = ("llmcompressor", "torch", "transformers", "compressed-tensors")


def main() -> None:
    """Read the command line, prune, and write the model and the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a folder")
    parser.add_argument("samples", type=Path, help="what take_samples.py wrote")
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--sparsity", type=float, required=True, help="of every matrix, 0 to 1")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--json", type=Path, required=True, help="where the result goes")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    samples = json.loads(args.samples.read_text(encoding="utf-8"))
    start = time.perf_counter(), time.process_time()
    prune(model, tokenizer, samples["ids"], METHODS[args.method], args.sparsity)
    pruning = time.perf_counter() - start[0], time.process_time() - start[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    model.save_pretrained(args.out, save_compressed=False)
    tokenizer.save_pretrained(args.out)
    result = {
        "method": args.method,
        "asked": args.sparsity,
        "sparsity": sparsity(model),
        "samples": samples["samples"],
        "pruning_seconds": pruning[0],
        "pruning_cpu_seconds": pruning[1],
        "pruning_peak_bytes": peak,
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    args.json.write_text(json.dumps(result), encoding="utf-8")


def prune(
    model: PreTrainedModel,
    tokenizer: object,
    ids: list[list[int]],
    method: type,
    sparsity: float,
) -> None:
    """Prune the model in place."""
    columns: dict[str, Any] = {"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_dict(columns),
        recipe=method(sparsity=sparsity, targets=[TARGETS]),
        max_seq_length=len(ids[0]),
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )


def sparsity(model: PreTrainedModel) -> float:
    """The share of the MLPs' weights that is zero."""
    weights = [
        module.weight
        for name, module in model.named_modules()
        if ".mlp." in name and isinstance(module, torch.nn.Linear)
    ]
    return 1 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)


if __name__ == "__main__":
    main()
