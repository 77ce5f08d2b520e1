"""Quantizes a pruned model with llm-compressor, and counts which of its zeros are left.

    quantizer/bin/python benchmarks/peers/quantize_after.py MODEL --text TEXT --out DIR

It runs in a virtual environment of its own, which has llm-compressor and no emp-llm. MODEL is a
folder that ``emp-llm prune --format dense`` or ``emp-llm unpack`` wrote. Every linear layer but the
head is rounded to the nearest value of a scheme, without data, and DIR/SCHEME gets what
compressed-tensors makes of it. transformers loads that again; then zeros are looked for at the
places where MODEL has some, and perplexities of both are computed on the beginning of TEXT. The
scheme GPTQ is W4A16, rounded by GPTQ with data: eight windows of TEXT that come after those. The
exit status is 1 if a zero is lost by any other.
"""

from __future__ import annotations

import argparse
import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig
from transformers.modeling_utils import PreTrainedModel

SCHEMES = ("W8A8", "W4A16", "W4A16_ASYM", "FP8_DYNAMIC", "NVFP4A16", "MXFP4A16")
SAMPLES = 8
PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")


def main() -> None:
    """Quantize by each scheme, load the result, print a row; write all rows as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a dense folder with zeros in it")
    parser.add_argument("--scheme", action="append", help=f"{', '.join(SCHEMES)} (all), or GPTQ")
    parser.add_argument(
        "--group",
        type=int,
        default=128,
        help="columns that share a scale of W4A16; has to divide all widths (default: 128)",
    )
    parser.add_argument("--text", type=Path, required=True, help="for perplexity")
    parser.add_argument("--tokens", type=int, default=4096, help="of the text (default: 4096)")
    parser.add_argument("--window", type=int, default=512, help="tokens at a time (default: 512)")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    options = parser.parse_args()
    dense = AutoModelForCausalLM.from_pretrained(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.text.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    windows = ids[0, : options.tokens].split(options.window)
    samples = ids[0, options.tokens :][: SAMPLES * options.window].split(options.window)
    zeros = {name: weight == 0 for name, weight in linear_weights(dense).items()}
    rows = {"unquantized": {**count(dense, zeros), "perplexity": perplexity(dense, windows)}}
    rows["unquantized"]["bytes"] = size(Path(options.model))
    print("unquantized", rows["unquantized"], flush=True)
    for scheme in options.scheme or SCHEMES:
        out = options.out / scheme
        rounded = AutoModelForCausalLM.from_pretrained(options.model)
        if scheme == "GPTQ":
            round_with_data(rounded, tokenizer, scheme_of("W4A16", options.group), samples)
        else:
            round_to_nearest(rounded, tokenizer, scheme_of(scheme, options.group))
        rounded.save_pretrained(out, save_compressed=True)
        loaded = AutoModelForCausalLM.from_pretrained(
            out, quantization_config=CompressedTensorsConfig(run_compressed=False)
        )
        rows[scheme] = {
            **count(loaded, zeros),
            "perplexity": perplexity(loaded, windows),
            "bytes": size(out),
        }
        print(scheme, rows[scheme], flush=True)
        if scheme != "GPTQ" and rows[scheme]["kept"] < rows[scheme]["zeros"]:
            raise SystemExit(f"{scheme} did not keep every zero")
    result = {"rows": rows, "versions": {name: version(name) for name in PACKAGES}}
    (options.out / "result.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")


def scheme_of(name: str, group: int) -> QuantizationScheme:
    """A scheme of compressed-tensors; one with groups of integers has groups of this size."""
    scheme = preset_name_to_scheme(name, ["Linear"])
    if name.startswith("W4A16"):
        scheme.weights.group_size = group
    return scheme


def round_to_nearest(model: PreTrainedModel, tokenizer: object, scheme: QuantizationScheme) -> None:
    """Quantize a model in place, each weight by itself."""
    recipe = QuantizationModifier(config_groups={"group_0": scheme}, ignore=["lm_head"])
    oneshot(model=model, processor=tokenizer, recipe=recipe)


def round_with_data(
    model: PreTrainedModel,
    tokenizer: object,
    scheme: QuantizationScheme,
    samples: tuple[torch.Tensor, ...],
) -> None:
    """Quantize a model in place; what rounding a weight costs is made up for by others."""
    ids = [window.tolist() for window in samples]
    columns: dict[str, Any] = {"input_ids": ids, "attention_mask": [[1] * len(it) for it in ids]}
    oneshot(
        model=model,
        processor=tokenizer,
        dataset=Dataset.from_dict(columns),
        recipe=GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"]),
        max_seq_length=len(ids[0]),
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )


def linear_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The weights of the linear layers but the head, by the layer's name."""
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def count(model: PreTrainedModel, zeros: dict[str, torch.Tensor]) -> dict[str, Any]:
    """How many of these zeros a model has, and how many others."""
    weights = linear_weights(model)
    if weights.keys() != zeros.keys():
        raise SystemExit("the quantized model has other linear layers than the dense one")
    return {
        "zeros": sum(int(it.sum()) for it in zeros.values()),
        "kept": sum(int((weights[name][it] == 0).sum()) for name, it in zeros.items()),
        "new": sum(int((weights[name][~it] == 0).sum()) for name, it in zeros.items()),
    }


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: tuple[torch.Tensor, ...]) -> float:
    """The exponential of the mean negative log-likelihood of each window's tokens but the first."""
    losses = [model(it[None], labels=it[None]).loss.item() * (len(it) - 1) for it in windows]
    return math.exp(sum(losses) / sum(len(it) - 1 for it in windows))


def size(folder: Path) -> int:
    """Bytes of the weights' files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
