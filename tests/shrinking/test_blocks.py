"""Fewer decoder blocks: the config says of each that stays what it said before."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import make_model
from support.stacks import STACKS, bypassed, make_stack
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from emp_llm import CheckpointError
from emp_llm.hub.source import find_source
from emp_llm.runtime.progress import SharedProgress, Silent
from emp_llm.runtime.quiet import calm
from emp_llm.runtime.workers import Workers
from emp_llm.shrinking.block_likeness import check_alike
from emp_llm.shrinking.blocks import Blocks
from emp_llm.shrinking.choice import Choice
from emp_llm.shrinking.config_fields import ModelConfig
from emp_llm.shrinking.plan import ShrinkPlan
from emp_llm.shrinking.writing import write_config_and_index, write_shards
from emp_llm.structure.meta_model import build_meta_model

pytestmark = pytest.mark.usefixtures("one_thread")

KEPT = (0, 2, 3, 5)
TOKENS = torch.tensor([[5, 9, 13, 17, 21, 25, 29, 7], [6, 10, 14, 18, 22, 26, 30, 4]])


def config_of(model: PreTrainedModel) -> dict[str, Any]:
    """The content of its config.json."""
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=True))
    return {**config, "architectures": [type(model).__name__]}


def smaller_config(config: dict[str, Any], kept: Sequence[int]) -> dict[str, Any]:
    """The config with these blocks, which are checked to be what they were."""
    with calm():
        full = build_meta_model(Path(), 0, config)
        assert Blocks().amounts(ModelConfig(config, full.config)).number > max(kept)
        found = Blocks().resized(ModelConfig(config, full.config), kept)
        check_alike(full, build_meta_model(Path(), 0, found), kept)
    return found


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=TOKENS, use_cache=False).logits
    assert torch.isfinite(found).all()
    return found


def renamed(blocks: str, name: str) -> str | None:
    """The name that a parameter has in the smaller model; None if its block is left out."""
    found = re.fullmatch(rf"({re.escape(blocks)}\.)(\d+)(\..*)", name)
    if not found:
        return name
    before, number, after = found.groups()
    return f"{before}{KEPT.index(int(number))}{after}" if int(number) in KEPT else None


@pytest.mark.parametrize("architecture", STACKS)
def test_a_model_of_the_new_config_is_the_dense_one_with_blocks_bypassed(architecture: str) -> None:
    dense, name = make_stack(architecture), STACKS[architecture][0]
    small = type(dense)(type(dense.config).from_dict(smaller_config(config_of(dense), KEPT)))
    weights = {renamed(name, key): tensor for key, tensor in dense.state_dict().items()}
    weights.pop(None, None)
    small.load_state_dict(weights)
    with bypassed(dense, architecture, KEPT):
        expected = logits_of(dense)
    assert torch.equal(logits_of(small.eval()), expected)


@pytest.mark.parametrize(
    ("architecture", "changes", "field"),
    [
        ("jamba", {"num_hidden_layers": 6}, "attn_layer_period 2"),
        (
            "gpt2",
            {"n_layer": 6, "scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx True",
        ),
        ("t5", {}, "is_encoder_decoder is true"),
        ("llama", {"num_hidden_layers": 1}, "num_hidden_layers is 1: "),
        ("llama", {"num_hidden_layers": 4, "num_kv_shared_layers": 2}, "num_kv_shared_layers is 2"),
    ],
)
def test_what_a_config_cannot_say_is_refused_in_one_line_that_names_the_field(
    architecture: str, changes: dict[str, Any], field: str
) -> None:
    config = config_of(make_model(architecture, **changes))
    with pytest.raises(CheckpointError) as refused:
        smaller_config(config, (0, 2, 3))
    assert field in str(refused.value)
    assert "\n" not in str(refused.value)


def test_lists_that_are_as_long_by_chance_stay() -> None:
    config = config_of(make_model("llama", num_hidden_layers=3, eos_token_id=[2, 3, 4]))
    assert smaller_config(config, (0, 2)) == {**config, "num_hidden_layers": 2}


@pytest.mark.parametrize("architecture", ["gemma3", "qwen2-moe"])
def test_the_smaller_checkpoint_computes_what_the_dense_one_does_without_those_blocks(
    tmp_path: Path, architecture: str
) -> None:
    check_written(tmp_path, architecture, torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("architecture", STACKS)
def test_so_do_those_of_all_architectures(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    check_written(tmp_path, architecture, dtype)


def check_written(tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    make_stack(architecture, dtype).save_pretrained(tmp_path / "dense", max_shard_size=4000)
    progress = SharedProgress(Silent())
    source = find_source(tmp_path / "dense", progress=progress)
    plan = ShrinkPlan.make(source, source.open_checkpoint(), ["blocks"])
    (holder,) = plan.structures["blocks"].holders
    shrinkage = plan.with_choices([Choice(kind="blocks", kept={holder: KEPT})])
    (out := tmp_path / "small").mkdir()
    write_shards(shrinkage, Workers(threads=1, progress=progress), out)
    write_config_and_index(shrinkage, out)

    auto: Any = AutoModelForImageTextToText if architecture == "llava" else AutoModelForCausalLM
    dense = auto.from_pretrained(tmp_path / "dense", dtype="auto")
    small, info = auto.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(info.values())
    assert small.dtype == dtype
    with bypassed(dense, architecture, KEPT):
        assert torch.equal(logits_of(small), logits_of(dense))
