"""from_pretrained with an EmpConfig gives the model that `emp-llm prune` would have written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.architectures import ARCHITECTURES
from support.checkpoints import (
    DOWN,
    GATE,
    UP,
    F,
    H,
    bits,
    differing,
    few_values,
    llama_config,
    load,
    pruned_by_rule,
    write_checkpoint,
)
from support.expected_targets import EXPECTED
from support.loading import DTYPES, Traces, each_with_a_dtype, load_model, logits, state, zeros
from transformers import LlamaForCausalLM

from emp_llm import EmpConfig, OptionError, PruneOptions, prune

TinyModel = Callable[..., Path]

OPTIONS: list[dict[str, Any]] = [
    {"granularity": "layer"},
    {"granularity": "model"},
    {"granularity": "model", "beta": 1.25, "targets": "all-linear"},
    {"beta": 0.5},
    {"beta": 1.25},
    {"targets": "attention"},
    {"targets": "all-linear", "beta": 0.5, "granularity": "layer"},
    {"targets": r"(layers?|h|block)\.0\."},
    {"targets": "all-linear", "ignore": (r"(layers?|h)\.0\.", "query|q_proj")},
]


def assert_same_model(found: Any, expected: Any) -> None:
    assert differing(state(found), state(expected)) == []
    assert torch.equal(logits(found), logits(expected))


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@each_with_a_dtype
def test_a_model_pruned_while_it_is_loaded_is_the_pruned_checkpoint_loaded(
    tiny_model: TinyModel, expected_model: Any, architecture: str, dtype: Any, sharded: bool
) -> None:
    source = tiny_model(architecture, dtype, sharded=sharded)
    model = load_model(architecture, source, quantization_config=EmpConfig())
    weights, said = expected_model(architecture, dtype, sharded=sharded)
    assert differing(state(model), weights) == []
    assert torch.equal(logits(model), said)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_left_is_what_the_rule_in_float64_keeps(
    tiny_model: TinyModel, tmp_path: Path, architecture: str
) -> None:
    source, expected = tiny_model(architecture), EXPECTED[architecture]
    left = pruned_by_rule(
        load(source),
        expected.mlp,
        beta=1.0,
        granularity="row",
        transposed=expected.transposed,
    )
    folder = Path(shutil.copytree(source, tmp_path / "by rule"))
    save_file(left, folder / "model.safetensors", {"format": "pt"})
    model = load_model(architecture, source, quantization_config=EmpConfig())
    assert_same_model(model, load_model(architecture, folder))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("architecture", ["gpt2", "t5", "mixtral", "gpt-oss"])
def test_every_option_means_what_it_means_to_the_command(
    tiny_model: TinyModel, tmp_path: Path, architecture: str, options: dict[str, Any]
) -> None:
    source = tiny_model(architecture, sharded=True)
    prune(source, tmp_path / "dense", PruneOptions(output_format="dense", **options))
    model = load_model(architecture, source, quantization_config=EmpConfig(**options))
    expected = state(load_model(architecture, tmp_path / "dense"))
    assert differing(state(model), expected) == []
    assert differing(expected, state(load_model(architecture, source))) != []


@pytest.mark.parametrize("granularity", ["row", "layer", "model"])
@pytest.mark.parametrize("beta", [0.5, 1.0, 1.25])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_ties_and_zeros_of_either_sign_are_left_as_the_rule_in_float64_says(
    tmp_path: Path, dtype: Any, beta: float, granularity: str
) -> None:
    tensors = {
        DOWN: few_values(H, F, dtype=dtype, seed=1),
        GATE: few_values(F, H, dtype=dtype, seed=2),
        UP: few_values(F, H, dtype=dtype, seed=3),
    }
    config = llama_config(H, F) | {"dtype": str(dtype).removeprefix("torch.")}
    source = write_checkpoint(tmp_path / "source", config, tensors)
    model = LlamaForCausalLM.from_pretrained(
        source, quantization_config=EmpConfig(beta=beta, granularity=granularity)
    )
    left = pruned_by_rule(tensors, tensors, beta=beta, granularity=granularity)
    for name, expected in left.items():
        assert bits(model.get_parameter(name).detach()) == bits(expected), name


def test_a_worked_example(tmp_path: Path) -> None:
    # N_eff of each row: 100 / 30 = 3.33…, 16 / 4 = 4, 4 / 4 = 1; of zeros alone nothing is kept
    rows = [[-1.0, 2.0, -3.0, 4.0], [1.0, -1.0, 1.0, -1.0], [0.0, -2.0, -0.0, 0.0], [0.0] * 4]
    left = [[0.0, 2.0, -3.0, 4.0], [1.0, -1.0, 1.0, -1.0], [0.0, -2.0, 0.0, 0.0], [0.0] * 4]
    tensors = {
        DOWN: torch.tensor(rows),
        GATE: torch.tensor(rows),
        UP: torch.tensor(rows),
    }
    source = write_checkpoint(tmp_path / "source", llama_config(4, 4), tensors)
    model = LlamaForCausalLM.from_pretrained(source, quantization_config=EmpConfig())
    for name in tensors:
        assert bits(model.get_parameter(name).detach()) == bits(torch.tensor(left)), name


def test_the_targets_are_named_as_in_the_checkpoint_not_as_in_the_model(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    source, pattern = tiny_model("mixtral"), r"experts\.2\.w3\."
    config = EmpConfig(targets=pattern, ignore=r"^model\.layers\.0")
    model = load_model("mixtral", source, quantization_config=config)
    model.save_pretrained(tmp_path / "saved")
    (name,) = {
        name.removesuffix(".emp_meta")
        for name in load(tmp_path / "saved")
        if name.endswith("emp_meta")
    }
    assert name == "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    gate_up = model.get_parameter("model.layers.1.mlp.experts.gate_up_proj")
    zeros_of = (gate_up == 0).reshape(4, 2, -1).sum(-1)  # w1 is the first half, w3 the second
    assert zeros_of[2, 1] > 0
    assert zeros_of.sum() == zeros_of[2, 1]


def test_only_the_targets_lose_weights(tiny_model: TinyModel) -> None:
    source = tiny_model("llama-tied")
    before = state(load_model("llama-tied", source))
    after = state(load_model("llama-tied", source, quantization_config=EmpConfig()))
    assert set(differing(after, before)) == set(EXPECTED["llama-tied"].mlp)


def test_a_tied_head_stays_the_embedding(tiny_model: TinyModel) -> None:
    config = EmpConfig(targets="all-linear")
    model = load_model("llama-tied", tiny_model("llama-tied"), quantization_config=config)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_config_says_how_the_model_was_pruned(tiny_model: TinyModel) -> None:
    config = EmpConfig(beta=0.75, granularity="layer", targets="attention", ignore="q_proj")
    model = load_model("llama", tiny_model("llama"), quantization_config=config)
    found = model.config.to_dict()["quantization_config"]
    rule = {"beta": 0.75, "granularity": "layer", "targets": "attention", "ignore": ["q_proj"]}
    assert found.items() >= ({"quant_method": "emp", "format_version": 2} | rule).items()


def test_one_config_can_be_used_for_many_models_and_stays_as_it_is(tiny_model: TinyModel) -> None:
    config = EmpConfig(beta=0.75)
    before = json.dumps(config.to_dict(), sort_keys=True)
    models = [
        load_model("llama", tiny_model("llama"), quantization_config=config) for _ in range(2)
    ]
    assert differing(state(models[0]), state(models[1])) == []
    assert json.dumps(config.to_dict(), sort_keys=True) == before


def test_a_config_can_be_given_as_a_dictionary_as_transformers_allows(
    tiny_model: TinyModel,
) -> None:
    config = EmpConfig(beta=0.75)
    source = tiny_model("llama")
    expected = state(load_model("llama", source, quantization_config=config))
    found = state(load_model("llama", source, quantization_config=config.to_dict()))
    assert differing(found, expected) == []


def test_every_setting_and_file_is_as_before_after_loading(tiny_model: TinyModel) -> None:
    source = tiny_model("mixtral", sharded=True)
    traces = Traces()
    model = load_model("mixtral", source, quantization_config=EmpConfig())
    assert traces.left() == set()
    assert zeros(model, "model.layers.0.mlp.experts.down_proj") > 0


# The config itself


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan"), float("inf")])
def test_beta_must_be_finite_and_positive(beta: float) -> None:
    with pytest.raises(OptionError, match="beta is"):
        EmpConfig(beta=beta)


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("granularity", "column", r"granularity is 'column'; choose one of row, layer, model"),
        ("targets", "(", r"targets '\(' is not a regular expression"),
        ("ignore", ["fine", "["], r"ignore '\[' is not a regular expression"),
        ("ignore", "[", r"ignore '\[' is not a regular expression"),
        ("criterion", "wanda", r"criterion is 'wanda'; while loading it must be 'magnitude'"),
    ],
)
def test_a_value_out_of_range_is_refused_where_it_is_given(
    option: str, value: Any, reason: str
) -> None:
    with pytest.raises(OptionError, match=reason):
        EmpConfig(**{option: value})


def test_an_option_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TypeError, match="sparsity"):
        EmpConfig(sparsity=0.5)


@pytest.mark.parametrize("ignore", ["down", ["down"], ("down",)])
def test_ignore_is_one_regular_expression_or_several(ignore: Any) -> None:
    assert EmpConfig(ignore=ignore).options() == PruneOptions(ignore=("down",))


def test_a_config_prints_its_options() -> None:
    assert '"beta": 0.75' in repr(EmpConfig(beta=0.75))
