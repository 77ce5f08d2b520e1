"""Weights of every kind come through loading, saving and loading again, to the bit."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from emp_kernels.numbers import BF16, F16, F32
from safetensors.torch import save_file
from support.architectures import save_tiny_model
from support.checkpoints import DOWN, GATE, UP, Tensors, bits, load
from support.packing import pack
from support.rows import KINDS, make_rows
from transformers import LlamaForCausalLM

from emp_llm import EmpConfig, PruneOptions, prune, unpack

DTYPES = {BF16: torch.bfloat16, F16: torch.float16, F32: torch.float32}
HIDDEN = 16


def shapes(intermediate: int) -> dict[str, tuple[int, int]]:
    return {
        DOWN: (HIDDEN, intermediate),
        GATE: (intermediate, HIDDEN),
        UP: (intermediate, HIDDEN),
    }


def as_tensor(rows: Any, number_format: Any) -> torch.Tensor:
    signed = rows.view(f"i{rows.itemsize}").copy()
    return torch.from_numpy(signed).view(DTYPES[number_format])


def write_llama(folder: Path, dtype: torch.dtype, intermediate: int, matrices: Tensors) -> Path:
    """A whole Llama of one layer with these matrices for its MLP."""
    save_tiny_model(
        folder, "llama", dtype=dtype, intermediate_size=intermediate, num_hidden_layers=1
    )
    tensors = load(folder) | matrices
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def assert_every_way_gives(expected: Tensors, source: Path, tmp_path: Path) -> None:
    """Loaded packed, loaded again, pruned while loaded, saved from there, and unpacked."""
    prune(source, tmp_path / "packed")
    packed = LlamaForCausalLM.from_pretrained(tmp_path / "packed")
    packed.save_pretrained(tmp_path / "saved")
    pruned = LlamaForCausalLM.from_pretrained(source, quantization_config=EmpConfig())
    pruned.save_pretrained(tmp_path / "pruned")
    models = [
        packed,
        pruned,
        LlamaForCausalLM.from_pretrained(tmp_path / "saved"),
        LlamaForCausalLM.from_pretrained(tmp_path / "pruned"),
    ]
    unpack(tmp_path / "saved", tmp_path / "unpacked")
    unpacked = load(tmp_path / "unpacked")
    for name, tensor in expected.items():
        for model in models:
            assert bits(model.get_parameter(name).detach()) == bits(tensor), name
        assert bits(unpacked[name]) == bits(tensor), name


@pytest.mark.parametrize("number_format", DTYPES, ids=lambda it: it.name)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_every_kind_come_through(tmp_path: Path, kind: str, number_format: Any) -> None:
    tensors = {
        name: as_tensor(make_rows(kind, number_format, shape, seed=seed), number_format)
        for seed, (name, shape) in enumerate(shapes(24).items())
    }
    source = write_llama(tmp_path / "source", DTYPES[number_format], 24, tensors)
    prune(source, tmp_path / "dense", PruneOptions(output_format="dense"))
    dense = load(tmp_path / "dense")
    assert_every_way_gives({name: dense[name] for name in tensors}, source, tmp_path)


@pytest.mark.parametrize("intermediate", [1, 2, 7, 9, 65])
def test_rows_of_any_length_come_through(tmp_path: Path, intermediate: int) -> None:
    tensors = {
        name: as_tensor(make_rows("gaussian", BF16, shape, seed=seed), BF16)
        for seed, (name, shape) in enumerate(shapes(intermediate).items())
    }
    source = write_llama(tmp_path / "source", torch.bfloat16, intermediate, tensors)
    prune(source, tmp_path / "dense", PruneOptions(output_format="dense"))
    dense = load(tmp_path / "dense")
    assert_every_way_gives({name: dense[name] for name in tensors}, source, tmp_path)


@pytest.mark.parametrize("number_format", DTYPES, ids=lambda it: it.name)
def test_rows_that_the_rule_leaves_whole_come_through(tmp_path: Path, number_format: Any) -> None:
    # N_eff of N weights of one magnitude is N: nothing is pruned
    tensors = {
        name: torch.where(torch.arange(shape[0] * shape[1]) % 3 == 0, -0.75, 0.75)
        .reshape(shape)
        .to(DTYPES[number_format])
        for name, shape in shapes(24).items()
    }
    source = write_llama(tmp_path / "source", DTYPES[number_format], 24, tensors)
    assert_every_way_gives(tensors, source, tmp_path)


@pytest.mark.parametrize("number_format", DTYPES, ids=lambda it: it.name)
def test_smallest_and_largest_weights_side_by_side_come_through(
    tmp_path: Path, number_format: Any
) -> None:
    # one huge weight is all that is effective in its row; rows of the smallest ones keep them all
    smallest = torch.tensor(1, dtype=torch.int32 if number_format is F32 else torch.int16)
    tiny = smallest.view(DTYPES[number_format])
    huge = torch.finfo(DTYPES[number_format]).max
    tensors, expected = {}, {}
    for name, shape in shapes(24).items():
        weights = tiny.repeat(shape)
        weights[:, 1::2] *= -1
        weights[::2, 5] = -huge
        left = weights.clone()
        left[::2] = torch.where(weights[::2] == -huge, weights[::2], 0.0)
        tensors[name], expected[name] = weights, left
    source = write_llama(tmp_path / "source", DTYPES[number_format], 24, tensors)
    assert_every_way_gives(expected, source, tmp_path)


@pytest.mark.parametrize("number_format", DTYPES, ids=lambda it: it.name)
def test_negative_zeros_that_were_kept_come_through(tmp_path: Path, number_format: Any) -> None:
    # with a large β every weight is kept, the zeros with their signs
    zeros = torch.zeros(24 * HIDDEN).to(DTYPES[number_format])
    pattern = zeros.clone()
    pattern[::2] = -0.0
    pattern[::5] = -1.0
    tensors = {name: pattern.reshape(shape).clone() for name, shape in shapes(24).items()}
    source = write_llama(tmp_path / "source", DTYPES[number_format], 24, tensors)
    pruned = LlamaForCausalLM.from_pretrained(source, quantization_config=EmpConfig(beta=100))
    pruned.save_pretrained(tmp_path / "saved")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    again.save_pretrained(tmp_path / "twice")
    last = LlamaForCausalLM.from_pretrained(tmp_path / "twice")
    for name, tensor in tensors.items():
        for model in (pruned, again, last):
            assert bits(model.get_parameter(name).detach()) == bits(tensor), name


@pytest.mark.parametrize("radix", [1, 2, 4, 6, 16])
def test_a_layout_of_another_writer_is_read_and_right_after_saving(
    tmp_path: Path, radix: int
) -> None:
    kinds = ("gaussian", "heavy tailed", "an outlier")
    rows: dict[str, np.ndarray] = {
        name: make_rows(kind, BF16, shape, seed=radix)
        for kind, (name, shape) in zip(kinds, shapes(24).items(), strict=True)
    }
    planes = {}
    for name, dense in rows.items():
        packed = pack(name, dense, BF16, beta=100, radix=radix, align=4)
        planes |= {key: torch.from_numpy(plane.copy()) for key, plane in packed.items()}
    source = write_llama(tmp_path / "source", torch.bfloat16, 24, planes)
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "emp", "format_version": 1}
    (source / "config.json").write_text(json.dumps(config))
    model = LlamaForCausalLM.from_pretrained(source)
    model.save_pretrained(tmp_path / "saved")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    for name, dense in rows.items():
        expected = bits(as_tensor(dense, BF16))
        assert bits(model.get_parameter(name).detach()) == expected
        assert bits(again.get_parameter(name).detach()) == expected
