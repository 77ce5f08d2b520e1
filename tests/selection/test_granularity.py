"""Pruned weights are those that the rule leaves, to the bit, whatever a group is."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import (
    DOWN,
    GATE,
    UP,
    F,
    H,
    Tensors,
    differing,
    few_values,
    files,
    gaussian,
    llama_config,
    load,
    mlp,
    pruned_by_rule,
    write_checkpoint,
)
from support.expected_targets import EXPECTED

from emp_llm import PruneOptions, prune, unpack

TinyModel = Callable[..., Path]

GRANULARITIES = ("row", "layer", "model")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def prune_and_unpack(source: Path, tmp_path: Path, **options) -> Tensors:
    prune(source, tmp_path / "packed", PruneOptions(**options))
    unpack(tmp_path / "packed", tmp_path / "dense")
    return load(tmp_path / "dense")


def assert_rule_holds(
    source: Path, tmp_path: Path, names: list[str], transposed: list[str] = (), **options
) -> None:
    found = prune_and_unpack(source, tmp_path, **options)
    selection = {key: options[key] for key in ("beta", "granularity")}
    expected = pruned_by_rule(load(source), names, transposed=transposed, **selection)
    assert differing(found, expected) == []


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_pruned_llama_has_the_weights_that_the_rule_leaves(
    tiny_model: TinyModel, tmp_path: Path, dtype: torch.dtype, granularity: str, beta: float
) -> None:
    source, names = tiny_model("llama", dtype), EXPECTED["llama"].mlp
    assert_rule_holds(source, tmp_path, names, beta=beta, granularity=granularity)


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_sharded_llama_is_pruned_by_the_same_rule(
    tiny_model: TinyModel, tmp_path: Path, granularity: str, beta: float
) -> None:
    source, names = tiny_model("llama", sharded=True), EXPECTED["llama"].mlp
    assert len(list(source.glob("*.safetensors"))) > 1
    assert_rule_holds(source, tmp_path, names, beta=beta, granularity=granularity)


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("architecture", ["gpt2", "mixtral", "qwen2-moe", "gpt-oss", "llama4"])
def test_columns_of_conv1d_and_matrices_of_each_expert_are_groups_of_their_own(
    tiny_model: TinyModel, tmp_path: Path, architecture: str, granularity: str, beta: float
) -> None:
    expected = EXPECTED[architecture]
    transposed = [name for name in expected.transposed if name in expected.mlp]
    source = tiny_model(architecture)
    rule = {"beta": beta, "granularity": granularity}
    assert_rule_holds(source, tmp_path, expected.mlp, transposed, **rule)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("architecture", ["t5", "jamba", "bert"])
def test_encoders_and_other_decoder_blocks_are_pruned_by_the_same_rule(
    tiny_model: TinyModel, tmp_path: Path, architecture: str, granularity: str
) -> None:
    source, names = tiny_model(architecture), EXPECTED[architecture].mlp
    assert_rule_holds(source, tmp_path, names, beta=1.0, granularity=granularity)


@pytest.mark.parametrize("targets", ["attention", "all-linear"])
def test_other_targets_are_pruned_by_the_same_rule(
    tiny_model: TinyModel, tmp_path: Path, targets: str
) -> None:
    expected = EXPECTED["gpt2"]
    names = expected.attention + (expected.mlp if targets == "all-linear" else [])
    transposed = [name for name in expected.transposed if name in names]
    rule = {"beta": 1.0, "granularity": "row", "targets": targets}
    assert_rule_holds(tiny_model("gpt2"), tmp_path, names, transposed, **rule)


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_equal_weights_and_zeros_of_both_signs_are_kept_as_the_rule_says(
    tmp_path: Path, dtype: torch.dtype, granularity: str, beta: float
) -> None:
    tensors = {
        DOWN: few_values(H, F, dtype=dtype, seed=1),
        GATE: few_values(F, H, dtype=dtype, seed=2),
        UP: few_values(F, H, dtype=dtype, seed=3),
    }
    tensors[GATE][3] = 0.0
    tensors[GATE][4] = -0.0
    tensors[GATE][5, 1:] = -0.0
    source = write_checkpoint(tmp_path / "source", llama_config(H, F), tensors)
    assert_rule_holds(source, tmp_path, list(tensors), beta=beta, granularity=granularity)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_equal_experts_lose_their_last_neurons_first(
    tiny_model: TinyModel, tmp_path: Path, granularity: str
) -> None:
    source = tiny_model("gpt-oss")
    names = EXPECTED["gpt-oss"].mlp
    tensors = load(source)
    for seed, name in enumerate(names):
        tensors[name] = few_values(*tensors[name].shape, seed=seed)
    tied = write_checkpoint(tmp_path / "tied", {}, tensors)
    (tied / "config.json").write_bytes((source / "config.json").read_bytes())
    assert_rule_holds(tied, tmp_path, names, names, beta=1.0, granularity=granularity)


def test_ties_of_a_model_stay_in_the_order_of_tensor_names_then_row_by_row(tmp_path: Path) -> None:
    # 3 × 240 equal weights: N_eff = 720, β = 0.5 keeps the first 360 of down, gate, up
    ones = {
        DOWN: torch.ones(H, F, dtype=torch.bfloat16),
        GATE: -torch.ones(F, H, dtype=torch.bfloat16),
        UP: torch.ones(F, H, dtype=torch.bfloat16),
    }
    shards = [{UP: ones[UP]}, {GATE: ones[GATE]}, {DOWN: ones[DOWN]}]
    source = write_checkpoint(tmp_path / "source", llama_config(H, F), *shards)
    found = prune_and_unpack(source, tmp_path, beta=0.5, granularity="model")
    half = ones[GATE].clone()
    half[10:] = 0.0
    expected = {DOWN: ones[DOWN], GATE: half, UP: torch.zeros_like(ones[UP])}
    assert differing(found, expected) == []


def test_names_are_ordered_as_text_so_layer_10_comes_before_layer_2(tmp_path: Path) -> None:
    layers = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(11)]
    zeros = {name: torch.zeros(F, H) for name in layers}
    ones = {layers[i]: torch.ones(F, H) for i in (2, 10)}
    source = write_checkpoint(tmp_path / "source", llama_config(H, F, layers=11), zeros | ones)
    found = prune_and_unpack(source, tmp_path, beta=0.5, granularity="model")
    assert differing(found, zeros | {layers[10]: ones[layers[10]]}) == []


@pytest.mark.parametrize("beta", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_weights_of_different_dtypes_are_ranked_together_by_their_values(
    tmp_path: Path, granularity: str, beta: float
) -> None:
    down = few_values(H, F, dtype=torch.bfloat16, seed=1)
    gate = few_values(F, H, dtype=torch.float16, seed=2)
    up = few_values(F, H, dtype=torch.float32, seed=3)
    up[::2] *= 1 + torch.arange(H) * 2.0**-23  # next to the others' values, not equal to them
    gate[::3] *= 1 + 2.0**-10
    source = write_checkpoint(
        tmp_path / "source", llama_config(H, F), {GATE: gate}, {UP: up, DOWN: down}
    )
    assert_rule_holds(source, tmp_path, [DOWN, GATE, UP], beta=beta, granularity=granularity)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_float32_weights_that_differ_in_their_last_bits_are_told_apart(
    tmp_path: Path, granularity: str
) -> None:
    order = torch.randperm(F * H, generator=torch.Generator().manual_seed(0))
    tensors = {UP: (1 + order.reshape(F, H) * 2.0**-23).float()}
    source = write_checkpoint(tmp_path / "source", llama_config(H, F), tensors)
    assert_rule_holds(source, tmp_path, [UP], beta=0.6, granularity=granularity)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outliers_and_subnormals_come_out_as_they_went_in(
    tmp_path: Path, dtype: torch.dtype, granularity: str
) -> None:
    info = torch.finfo(dtype)
    tensors = mlp(H, F, dtype)
    tensors[UP][:, 0] = info.max
    tensors[GATE] = torch.zeros(F, H, dtype=dtype)
    tensors[GATE][:, ::2] = -info.smallest_normal / 4
    tensors[GATE][0, 1] = info.tiny
    source = write_checkpoint(tmp_path / "source", llama_config(H, F), tensors)
    assert_rule_holds(source, tmp_path, list(tensors), beta=1.5, granularity=granularity)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_matrices_of_one_row_or_one_column_are_pruned(tmp_path: Path, granularity: str) -> None:
    tensors = mlp(H, 1)
    source = write_checkpoint(tmp_path / "source", llama_config(H, 1), tensors)
    assert_rule_holds(source, tmp_path, list(tensors), beta=1.0, granularity=granularity)


def test_a_row_of_equal_weights_is_kept_whole(tmp_path: Path) -> None:
    tensors = {UP: torch.full((F, H), 0.1, dtype=torch.float16)}
    source = write_checkpoint(tmp_path / "source", llama_config(H, F), tensors)
    assert differing(prune_and_unpack(source, tmp_path), tensors) == []


def test_a_large_beta_keeps_everything(tmp_path: Path) -> None:
    tensors = mlp(H, F)
    source = write_checkpoint(tmp_path / "source", llama_config(H, F), tensors)
    assert differing(prune_and_unpack(source, tmp_path, beta=1e9), tensors) == []


def test_a_tiny_beta_keeps_the_largest_weight_of_each_row(tmp_path: Path) -> None:
    weights = torch.tensor([[1.0, -5.0, 2.0], [3.0, 0.5, -3.0], [0.0, -0.0, 0.0]])
    source = write_checkpoint(tmp_path / "source", llama_config(3, 3), {UP: weights})
    expected = torch.tensor([[0.0, -5.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert differing(prune_and_unpack(source, tmp_path, beta=1e-9), {UP: expected}) == []


@pytest.mark.parametrize("block_bytes", [1, 100])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("output_format", ["packed", "dense"])
def test_a_tensor_in_many_row_blocks_gives_the_same_files(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    output_format: str,
    granularity: str,
    block_bytes: int,
) -> None:
    tensors = mlp(H, F) | {GATE: few_values(F, H, dtype=torch.float32)}
    source = write_checkpoint(tmp_path / "source", llama_config(H, F), tensors)
    options = PruneOptions(granularity=granularity, output_format=output_format)
    prune(source, tmp_path / "whole", options)
    monkeypatch.setattr("emp_llm.tensors.geometry.ROW_BLOCK_BYTES", block_bytes)
    prune(source, tmp_path / "blocks", options)
    assert files(tmp_path / "blocks") == files(tmp_path / "whole")


@pytest.mark.parametrize("block_bytes", [1, 100])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("architecture", ["gpt2", "gpt-oss"])
def test_a_transposed_tensor_in_many_row_blocks_is_pruned_by_the_same_rule(
    tiny_model: TinyModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    architecture: str,
    granularity: str,
    block_bytes: int,
) -> None:
    monkeypatch.setattr("emp_llm.tensors.geometry.TRANSPOSED_ROW_BLOCK_BYTES", block_bytes)
    names = EXPECTED[architecture].mlp
    source, rule = tiny_model(architecture), {"beta": 1.0, "granularity": granularity}
    assert_rule_holds(source, tmp_path, names, names, **rule)


def test_weights_of_one_magnitude_in_a_gaussian_model_are_a_third_gone(tmp_path: Path) -> None:
    # Gaussian weights keep 2/π of each row, less half a weight for rounding down
    tensors = {UP: gaussian(64, 4096, dtype=torch.float32)}
    source = write_checkpoint(tmp_path / "source", llama_config(4096, 64), tensors)
    kept = prune_and_unpack(source, tmp_path)[UP].count_nonzero().item() / tensors[UP].numel()
    assert kept == pytest.approx(0.6366, abs=0.003)


@pytest.mark.parametrize("columns", [2047, 2048, 2051])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows_are_pruned_by_the_same_rule(
    tmp_path: Path, dtype: torch.dtype, granularity: str, columns: int
) -> None:
    # rows from 2048 columns on are packed at 16-byte boundaries
    tensors = {UP: gaussian(5, columns, dtype=dtype)}
    source = write_checkpoint(tmp_path / "source", llama_config(columns, 5), tensors)
    assert_rule_holds(source, tmp_path, [UP], beta=1.0, granularity=granularity)


@pytest.mark.parametrize("columns", [65535, 65536])
@pytest.mark.parametrize("beta", [1.0, 9.0])
def test_a_row_may_keep_more_weights_than_16_bits_count(
    tmp_path: Path, columns: int, beta: float
) -> None:
    tensors = {UP: gaussian(2, columns)}
    source = write_checkpoint(tmp_path / "source", llama_config(columns, 2), tensors)
    assert_rule_holds(source, tmp_path, [UP], beta=beta, granularity="row")


def test_bits_that_are_zero_in_most_rows_only_are_kept_in_the_others(tmp_path: Path) -> None:
    weights = gaussian(320, 16).half()
    weights[317] = gaussian(16, dtype=torch.float16, seed=1)
    source = write_checkpoint(tmp_path / "source", llama_config(16, 320), {UP: weights})
    assert_rule_holds(source, tmp_path, [UP], beta=1.0, granularity="row")
