"""Compare how Meta's original format is read here with what transformers' converter makes of it.

    pip download --no-deps transformers==4.47.1    # the last release that ships the converter
    unzip transformers-4.47.1-*.whl 'transformers/models/llama/convert_*'
    python benchmarks/check_original.py transformers/models/llama/convert_llama_weights_to_hf.py

Tiny Llamas in one to four parts are converted by both. The configs are compared, every tensor bit
by bit (the converter makes all of them bfloat16), and the files that `prune` writes from the
original and from the converted model. It ends at the first difference.
"""

import argparse
import contextlib
import importlib.util
import io
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaConfig
from transformers.utils import logging

import emp_llm
from emp_llm import PruneOptions

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from support.original_llamas import F, V, params, split, whole_model, write_original

BF16, F16 = torch.bfloat16, torch.float16
LLAMA_3 = {"rope_theta": 500_000.0}
# version, parts, heads of keys and values, other fields of params.json, dtype, and the dimension
# along which the embedding is split
CASES: tuple[tuple[str, int, int | None, dict[str, Any], torch.dtype, int], ...] = (
    ("1", 2, None, {"norm_eps": 1e-6}, BF16, 1),
    ("2", 1, None, {}, BF16, 1),
    ("2", 4, 4, {}, BF16, 1),
    ("2", 2, 2, {"rope_theta": 1e6}, BF16, 1),
    ("2", 2, 4, {}, F16, 1),
    ("3", 1, 2, LLAMA_3, BF16, 0),
    ("3", 4, 4, LLAMA_3, BF16, 0),
    ("3.1", 2, 2, {**LLAMA_3, "use_scaled_rope": True}, BF16, 0),
)


def load_converter(path: Path) -> ModuleType:
    """Import the converter from its file."""
    spec = importlib.util.spec_from_file_location("converter", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def weights(folder: Path) -> dict[str, bytes]:
    """The content of each file of weights, by name."""
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def check(converter: ModuleType, folder: Path, number: int) -> str:
    """Check one case; returns its line of the table."""
    version, parts, kv_heads, more, dtype, axis = CASES[number]
    # these two give the size of the MLP, F, by the converter's formula
    fields = {**params(kv_heads), "ffn_dim_multiplier": F / (8 * 32 / 3), "multiple_of": 8, **more}
    tensors = split(whole_model(kv_heads or 8, dtype), parts, embedding_axis=axis)
    source = write_original(folder / "llama", fields, *tensors)
    with contextlib.redirect_stdout(io.StringIO()):
        converter.write_model(
            model_path=str(folder / "converted"),
            input_base_path=str(source),
            llama_version=version,
            vocab_size=V,
            num_shards=parts,
        )
    expected = load_file(folder / "converted" / "model.safetensors")
    same = 0
    # from float16 the converter makes another model, in bfloat16
    comparable = dtype != F16
    for output_format in ("dense", "packed"):
        out, twin = folder / f"{output_format}", folder / f"{output_format} twin"
        options = PruneOptions(output_format=output_format)
        emp_llm.prune(source, out, options)
        emp_llm.prune(folder / "converted", twin, options)
        same += weights(out) == weights(twin)
        assert not comparable or weights(out) == weights(twin), f"{output_format} files differ"
    found = load_file(folder / "dense" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        kept = tensor.to(BF16) == expected[name]
        # a tensor that is not a target is the same, and so is each weight of a target that stays
        assert bool((kept | (tensor == 0)).all()), f"{name} differs"
        assert "mlp" in name or bool(kept.all()), f"{name} differs"
    configs = [
        LlamaConfig.from_pretrained(folder / made).to_dict() for made in ("dense", "converted")
    ]
    left_out = set() if comparable else {"dtype"}
    differing = {
        name
        for name in configs[0].keys() | configs[1].keys()
        if configs[0].get(name) != configs[1].get(name)
    }
    assert differing <= left_out, f"the configs differ in {differing}"
    heads = f"{kv_heads or 8} of 8 heads"
    return (
        f"{version:<7} {parts:>5}  {heads:<12} {str(dtype).removeprefix('torch.'):<9}"
        f"{len(found):>7}  {same if comparable else '':>5}"
    )


def main() -> None:
    """Check all cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("converter", type=Path, help="convert_llama_weights_to_hf.py")
    converter = load_converter(parser.parse_args().converter)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print("version parts  keys, values dtype    tensors  files the same")
    for number in range(len(CASES)):
        with tempfile.TemporaryDirectory() as folder:
            print(check(converter, Path(folder), number), flush=True)


if __name__ == "__main__":
    main()
