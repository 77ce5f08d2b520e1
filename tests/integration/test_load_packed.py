"""from_pretrained of a packed folder gives the pruned model, and save_pretrained packs it again."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import ARCHITECTURES
from support.checkpoints import (
    DOWN,
    GATE,
    UP,
    Tensors,
    differing,
    llama_config,
    load,
    write_checkpoint,
)
from support.expected_targets import EXPECTED
from support.loading import Traces, each_with_a_dtype, load_model, logits, state
from transformers import LlamaForCausalLM

from emp_llm import EmpConfig, PruneOptions, densify, prune, unpack

TinyModel = Callable[..., Path]

PLANES = ("", ".emp_rows", ".emp_meta")


def kept_in_float32(weights: Tensors, dtype: torch.dtype) -> set[str]:
    """Names of what transformers holds in float32 in a model of another dtype, and of its planes.

    DeepSeek V3's router biases, T5's down projections and GPT-OSS's norms.
    """
    names = [name for name, tensor in weights.items() if tensor.dtype != dtype]
    return {name + suffix for name in names for suffix in PLANES}


def quantization_config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


@each_with_a_dtype
def test_loaded_saved_and_loaded_again_it_is_the_same_to_the_bit(
    pruned_model: TinyModel, expected_model: Any, tmp_path: Path, architecture: str, dtype: Any
) -> None:
    sharded = dtype == torch.bfloat16
    packed = pruned_model(architecture, dtype, sharded=sharded)
    weights, said = expected_model(architecture, dtype, sharded=sharded)
    model = load_model(architecture, packed)
    assert differing(state(model), weights) == []
    assert torch.equal(logits(model), said)

    model.save_pretrained(tmp_path / "saved")
    changed = set(differing(load(tmp_path / "saved"), load(packed)))
    assert changed <= kept_in_float32(weights, dtype)
    assert quantization_config(tmp_path / "saved") == quantization_config(packed)

    again = load_model(architecture, tmp_path / "saved")
    assert differing(state(again), weights) == []


@each_with_a_dtype
def test_a_model_pruned_while_it_was_loaded_is_saved_as_the_command_writes_it(
    tiny_model: TinyModel, pruned_model: TinyModel, tmp_path: Path, architecture: str, dtype: Any
) -> None:
    packed = pruned_model(architecture, dtype)
    model = load_model(
        architecture, tiny_model(architecture, dtype), quantization_config=EmpConfig()
    )
    model.save_pretrained(tmp_path)
    changed = set(differing(load(tmp_path), load(packed)))
    assert changed <= kept_in_float32(state(model), dtype)
    assert quantization_config(tmp_path) == quantization_config(packed)


@pytest.mark.parametrize("granularity", ["layer", "model"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "gpt-oss"])
def test_other_rules_are_saved_as_the_command_writes_them(
    tiny_model: TinyModel, tmp_path: Path, architecture: str, granularity: Any
) -> None:
    rule: dict[str, Any] = {"granularity": granularity, "beta": 0.75, "targets": "all-linear"}
    source = tiny_model(architecture)
    prune(source, tmp_path / "packed", PruneOptions(**rule))
    model = load_model(architecture, source, quantization_config=EmpConfig(**rule))
    model.save_pretrained(tmp_path / "saved")
    assert differing(load(tmp_path / "saved"), load(tmp_path / "packed")) == []
    assert quantization_config(tmp_path / "saved") == quantization_config(tmp_path / "packed")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_dense_twin_is_the_plain_checkpoint_with_no_trace_of_packing(
    pruned_model: TinyModel, tmp_path: Path, architecture: str
) -> None:
    dense = pruned_model(architecture, output_format="dense")
    model = load_model(architecture, pruned_model(architecture))
    assert densify(model) is model
    model.save_pretrained(tmp_path)
    load_model(architecture, dense).save_pretrained(tmp_path / "plain")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "plain" / name).read_bytes(), name
    assert set(differing(load(tmp_path), load(dense))) <= kept_in_float32(
        state(model), torch.bfloat16
    )
    assert quantization_config(tmp_path) is None


def test_a_small_shard_size_makes_many_shards_that_hold_each_tensor_whole(
    pruned_model: TinyModel, tmp_path: Path
) -> None:
    model = load_model("mixtral", pruned_model("mixtral"))
    model.save_pretrained(tmp_path / "saved", max_shard_size="2KB")
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    where = index["weight_map"]
    assert len(set(where.values())) > 5
    for name in EXPECTED["mixtral"].mlp:
        assert len({where[name + suffix] for suffix in PLANES}) == 1, name
    for path in (tmp_path / "saved").glob("*.safetensors"):
        assert path.stat().st_size < 4096
    held = load(tmp_path / "saved")
    assert where.keys() == held.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in held.values())
    assert differing(held, load(pruned_model("mixtral"))) == []
    again = load_model("mixtral", tmp_path / "saved")
    assert differing(state(again), state(model)) == []


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5", "mixtral", "gpt-oss"])
def test_unpack_reads_what_save_pretrained_wrote(
    pruned_model: TinyModel, tmp_path: Path, architecture: str
) -> None:
    load_model(architecture, pruned_model(architecture)).save_pretrained(
        tmp_path / "saved", max_shard_size="4KB"
    )
    unpack(tmp_path / "saved", tmp_path / "dense")
    expected = load(pruned_model(architecture, output_format="dense"))
    assert differing(load(tmp_path / "dense"), expected) == []
    assert quantization_config(tmp_path / "dense") is None


def test_a_packed_folder_is_smaller_than_the_dense_one(tmp_path: Path) -> None:
    tensors = {
        DOWN: torch.randn(64, 256).bfloat16(),
        GATE: torch.randn(256, 64).bfloat16(),
        UP: torch.randn(256, 64).bfloat16(),
    }
    config = llama_config(64, 256) | {"dtype": "bfloat16"}
    source = write_checkpoint(tmp_path / "source", config, tensors)
    model = LlamaForCausalLM.from_pretrained(source, quantization_config=EmpConfig())
    model.save_pretrained(tmp_path / "saved")
    held = load(tmp_path / "saved")
    packed = sum(held[name + suffix].nbytes for name in tensors for suffix in PLANES)
    assert 0.4 < packed / sum(tensor.nbytes for tensor in tensors.values()) < 0.55


# After changes


@pytest.mark.parametrize("now", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt2", "gpt-oss"])
def test_a_model_that_was_cast_is_packed_in_its_new_dtype(
    pruned_model: TinyModel, tmp_path: Path, architecture: str, now: torch.dtype
) -> None:
    model = load_model(architecture, pruned_model(architecture, torch.float32)).to(now)
    expected = load_model(
        architecture, pruned_model(architecture, torch.float32, output_format="dense")
    ).to(now)
    model.save_pretrained(tmp_path / "saved")
    expected.save_pretrained(tmp_path / "plain")
    again, expected = (load_model(architecture, tmp_path / name) for name in ("saved", "plain"))
    assert differing(state(again), state(expected)) == []
    held = load(tmp_path / "saved")
    assert all(held[name].dtype == torch.uint8 for name in EXPECTED[architecture].mlp)


def test_weights_that_were_trained_are_saved_as_they_are_now(
    pruned_model: TinyModel, tmp_path: Path
) -> None:
    model = load_model("mixtral", pruned_model("mixtral"))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(noise * 0.01)
    model.save_pretrained(tmp_path)
    again = load_model("mixtral", tmp_path)
    assert differing(state(again), state(model)) == []


def test_a_state_dict_given_to_save_is_the_one_that_is_packed(
    pruned_model: TinyModel, tmp_path: Path
) -> None:
    model = load_model("mixtral", pruned_model("mixtral"))
    given = {name: tensor * 2 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=given)
    again = load_model("mixtral", tmp_path)
    assert differing(state(again), given) == []


def test_every_setting_and_file_is_as_before_after_loading_and_saving(
    pruned_model: TinyModel, tmp_path: Path
) -> None:
    packed = pruned_model("mixtral", sharded=True)
    traces = Traces()
    load_model("mixtral", packed).save_pretrained(tmp_path)
    assert traces.left() == set()
