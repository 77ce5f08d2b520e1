"""Smaller models with fewer neurons or groups of heads, for choices that are given."""

from pathlib import Path

import pytest
import torch
from support.architectures import save_tiny_model
from support.shrinking import found_plan, write_choice
from support.widths import NEURONS, WITH_GROUPS, WITH_NEURONS, make, mask
from transformers import AutoModelForCausalLM

from emp_llm import CheckpointError
from emp_llm.shrinking.choice import KindName

TOKENS = torch.tensor([[1, 5, 9, 13, 17, 21, 25, 29], [2, 6, 10, 14, 18, 22, 26, 30]])
KEPT: dict[KindName, list[tuple[int, ...]]] = {
    "neurons": [tuple(range(0, NEURONS, 2)), tuple(range(3, 23))],
    "kv heads": [(0, 2), (1, 2)],
}


def check(tmp_path: Path, architecture: str, dtype: torch.dtype, kind: KindName) -> None:
    dense = make(architecture, dtype)
    dense.save_pretrained(tmp_path / "dense", max_shard_size=4000)
    holders = {
        holder: int(holder.rpartition(".")[2])
        for holder in found_plan(tmp_path / "dense", kind).structures[kind].holders
    }
    kept = {holder: KEPT[kind][layer] for holder, layer in holders.items()}
    out = write_choice(tmp_path / "dense", tmp_path / "small", kept, kind)

    small, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)

    assert not any(info.values())
    assert small.dtype == dtype
    assert small.num_parameters() < dense.num_parameters()
    mask(dense, {layer: KEPT[kind][layer] for layer in holders.values()}, kind)
    with torch.no_grad():
        expected, found = dense(TOKENS).logits, small(TOKENS).logits
    # sums over fewer terms are rounded in other places
    close = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    scale = expected.abs().max().item()
    assert scale > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=close * scale)


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2"])
def test_with_fewer_neurons_it_computes_what_the_dense_model_does_with_those_masked(
    tmp_path: Path, architecture: str
) -> None:
    check(tmp_path, architecture, torch.float32, "neurons")


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt-oss"])
def test_with_fewer_groups_of_heads_it_computes_what_the_dense_model_does_with_those_masked(
    tmp_path: Path, architecture: str
) -> None:
    check(tmp_path, architecture, torch.float32, "kv heads")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", WITH_NEURONS)
def test_so_it_does_with_neurons_of_other_models(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    check(tmp_path, architecture, dtype, "neurons")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("architecture", WITH_GROUPS)
def test_so_it_does_with_groups_of_heads_of_other_models(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    check(tmp_path, architecture, dtype, "kv heads")


@pytest.mark.parametrize(
    ("architecture", "kind", "message"),
    [
        ("mixtral", "neurons", "experts have the width"),
        ("gpt2", "kv heads", "no field that would keep head_dim of GPT2Attention"),
        ("gpt-neox", "kv heads", "no field that would keep"),
        ("deepseek-v3", "kv heads", "emp-llm does not know how this model is made of them"),
        ("t5", "kv heads", "emp-llm does not know how this model is made of them"),
        ("llama", "kv heads", "num_key_value_heads is 1"),
    ],
)
def test_what_a_config_cannot_say_is_refused_in_one_line(
    tmp_path: Path, architecture: str, kind: KindName, message: str
) -> None:
    save_tiny_model(tmp_path / "model", architecture)
    with pytest.raises(CheckpointError, match=message) as error:
        found_plan(tmp_path / "model", kind)
    assert "\n" not in str(error.value)


def test_heads_that_are_normalized_together_are_refused(tmp_path: Path) -> None:
    make("olmo2").save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="normalizes all heads together"):
        found_plan(tmp_path / "model", "kv heads")
