"""Whatever from_pretrained is asked for: pruned while loaded, or unpacked, it is the same model.

Expected is what transformers itself makes, asked for the same, of the checkpoint that
``emp-llm prune --format dense`` wrote.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from support.architectures import make_model
from support.checkpoints import differing, load, write_checkpoint
from support.expected_targets import EXPECTED
from support.loading import DTYPES, load_model, logits, state
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from emp_llm import EmpConfig, PruneOptions, prune

TinyModel = Callable[..., Path]


@pytest.fixture(params=["pruned", "unpacked"])
def asked(request: pytest.FixtureRequest, tiny_model: TinyModel, pruned_model: TinyModel) -> Any:
    """Makes a folder to load from, and what to ask for besides."""

    def make(architecture: str, *args: Any, **kwargs: Any) -> tuple[Path, dict[str, Any]]:
        if request.param == "pruned":
            folder = tiny_model(architecture, *args, **kwargs)
            return folder, {"quantization_config": EmpConfig()}
        return pruned_model(architecture, *args, **kwargs), {}

    return make


@pytest.fixture
def both(asked: Any, pruned_model: TinyModel) -> Any:
    """Asks one loader for the same of our folder and of the dense one: (found, expected)."""

    def make(
        architecture: str,
        was: torch.dtype = torch.bfloat16,
        *,
        sharded: bool = False,
        loader: Any = None,
        **options: Any,
    ) -> tuple[Any, Any]:
        folder, more = asked(architecture, was, sharded=sharded)
        dense = pruned_model(architecture, was, sharded=sharded, output_format="dense")

        def load_one(path: Path, **given: Any) -> Any:
            if loader is None:
                return load_model(architecture, path, **given)
            return loader.from_pretrained(path, **given)

        return load_one(folder, **more, **options), load_one(dense, **options)

    return make


def assert_same(pair: tuple[Any, Any]) -> None:
    found, expected = pair
    assert differing(state(found), state(expected)) == []
    assert torch.equal(logits(found), logits(expected))


# dtypes

CASTS = [(was, now) for was in DTYPES for now in DTYPES if was != now]


@pytest.mark.parametrize(("was", "now"), CASTS, ids=[f"{was} as {now}" for was, now in CASTS])
@pytest.mark.parametrize(
    "architecture",
    # the first two have tensors that transformers keeps in float32
    [
        "t5",
        "gpt-oss",
        *(pytest.param(a, marks=pytest.mark.slow) for a in ("llama", "gpt2", "mixtral")),
    ],
)
def test_another_dtype_is_cast_to_after_the_mask_was_decided(
    both: Any, architecture: str, was: str, now: str
) -> None:
    assert_same(both(architecture, DTYPES[was], sharded=True, dtype=DTYPES[now]))


@pytest.mark.parametrize("dtype", ["auto", "float16", torch.float32, None])
def test_a_dtype_is_given_as_transformers_allows(both: Any, dtype: Any) -> None:
    assert_same(both("qwen3-moe", dtype=dtype))


def test_dtypes_of_the_parts_of_a_model_are_what_transformers_makes_of_them(both: Any) -> None:
    dtype = {"": "float16", "text_config": "float32", "vision_config": "float16"}
    found, expected = both("llava", dtype=dtype)
    assert differing(state(found), state(expected)) == []


# Classes


@pytest.mark.parametrize(
    "architecture",
    ["llama", "gpt2", "gpt-neox", "opt", "falcon", "t5", "mixtral", "gpt-oss", "llava"],
)
def test_a_model_without_its_head_is_loaded_from_a_checkpoint_with_one(
    both: Any, architecture: str
) -> None:
    assert_same(both(architecture, loader=AutoModel, sharded=True))


@pytest.mark.parametrize("way", ["pruned", "unpacked"])
@pytest.mark.parametrize(
    ("architecture", "loader"),
    [
        ("gpt2", AutoModelForCausalLM),
        ("bert", AutoModelForMaskedLM),
        ("llama-tied", AutoModelForCausalLM),
        ("mixtral", AutoModelForCausalLM),
    ],
)
def test_a_model_with_a_head_is_loaded_from_a_checkpoint_of_the_body_alone(
    tmp_path: Path, architecture: str, loader: Any, way: str
) -> None:
    # as the Hub's gpt2 and bert-base are: no name begins with the head's name for the body
    body = make_model(architecture).base_model
    body.save_pretrained(tmp_path / "body")
    prefix = f"{make_model(architecture).base_model_prefix}."
    assert not any(name.startswith(prefix) for name in load(tmp_path / "body"))
    for output_format in ("dense", "packed"):
        options = PruneOptions(output_format=output_format)
        prune(tmp_path / "body", tmp_path / output_format, options)
    expected, told = loader.from_pretrained(tmp_path / "dense", output_loading_info=True)
    if way == "pruned":
        found = loader.from_pretrained(tmp_path / "body", quantization_config=EmpConfig())
    else:
        found = loader.from_pretrained(tmp_path / "packed")
    assert set(differing(state(found), state(expected))) <= set(told["missing_keys"])
    assert not set(told["missing_keys"]) & set(EXPECTED[architecture].mlp)
    found.save_pretrained(tmp_path / "saved")
    again = loader.from_pretrained(tmp_path / "saved")
    assert differing(state(again), state(found)) == []
    packed = {name for name in load(tmp_path / "saved") if name.endswith(".emp_meta")}
    assert len(packed) == len(EXPECTED[architecture].mlp)


@pytest.mark.parametrize(
    ("architecture", "loader", "changes"),
    [("t5", "T5EncoderModel", {}), ("llama", "LlamaForCausalLM", {"num_hidden_layers": 1})],
)
def test_what_a_part_of_the_model_leaves_out_belongs_to_its_one_group(
    tiny_model: TinyModel, tmp_path: Path, architecture: str, loader: str, changes: dict[str, int]
) -> None:
    source = tiny_model(architecture)
    prune(source, tmp_path / "out", PruneOptions(granularity="model", output_format="dense"))
    part = getattr(transformers, loader)
    expected = part.from_pretrained(tmp_path / "out", **changes)
    found = part.from_pretrained(
        source, quantization_config=EmpConfig(granularity="model"), **changes
    )
    assert not differing(state(found), state(expected))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_another_head_is_new_and_the_rest_as_in_the_checkpoint(
    both: Any, architecture: str
) -> None:
    loader = transformers.AutoModelForSequenceClassification
    (found, told), (expected, expected_told) = both(
        architecture, loader=loader, num_labels=3, output_loading_info=True
    )
    assert told["missing_keys"] == expected_told["missing_keys"] == {"score.weight"}
    assert told["unexpected_keys"] == expected_told["unexpected_keys"]
    assert differing(state(found), state(expected)) == ["score.weight"]
    assert found.score.weight.shape == (3, 16)


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gpt2", "mixtral", "gpt-oss"])
def test_nothing_is_told_to_be_missing_or_left_over(asked: Any, architecture: str) -> None:
    folder, more = asked(architecture, sharded=True)
    _, told = load_model(architecture, folder, output_loading_info=True, **more)
    assert not any(told.values()), told


# Names and places of files


@pytest.mark.parametrize("way", ["pruned", "unpacked"])
def test_names_are_mapped_as_the_caller_says(
    tiny_model: TinyModel, pruned_model: TinyModel, tmp_path: Path, way: str
) -> None:
    source = tiny_model("llama") if way == "pruned" else pruned_model("llama")
    tensors = {name.replace("model.layers", "old.blocks"): it for name, it in load(source).items()}
    folder = Path(shutil.copytree(source, tmp_path / "renamed"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    mapping = {r"^old\.blocks": "model.layers"}
    more = {"quantization_config": EmpConfig()} if way == "pruned" else {}
    found = load_model("llama", folder, key_mapping=mapping, **more)
    expected = load_model("llama", pruned_model("llama", output_format="dense"))
    assert differing(state(found), state(expected)) == []
    found.save_pretrained(tmp_path / "saved")
    again = load_model("llama", tmp_path / "saved", key_mapping=mapping)
    assert differing(state(again), state(expected)) == []
    assert any(name.endswith(".emp_meta") for name in load(tmp_path / "saved"))


def test_a_subfolder_is_loaded_from(both: Any, asked: Any, tmp_path: Path) -> None:
    folder, more = asked("mixtral", sharded=True)
    shutil.copytree(folder, tmp_path / "repo" / "inner")
    found = load_model("mixtral", tmp_path / "repo", subfolder="inner", **more)
    assert_same((found, both("mixtral", sharded=True)[1]))


def test_a_variant_of_the_files_is_loaded(both: Any, asked: Any, tmp_path: Path) -> None:
    folder, more = asked("llama")
    shutil.copytree(folder, tmp_path / "repo")
    (tmp_path / "repo" / "model.safetensors").rename(tmp_path / "repo" / "model.new.safetensors")
    found = load_model("llama", tmp_path / "repo", variant="new", **more)
    assert_same((found, both("llama")[1]))


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt-oss", "gpt2"])
def test_a_shard_for_each_tensor_is_loaded(
    tiny_model: TinyModel, tmp_path: Path, architecture: str
) -> None:
    config = json.loads((tiny_model(architecture) / "config.json").read_text())
    shards = [{name: tensor} for name, tensor in load(tiny_model(architecture)).items()]
    write_checkpoint(tmp_path / "source", config, *shards[::-1])
    for output_format in ("dense", "packed"):
        options = PruneOptions(output_format=output_format)
        prune(tmp_path / "source", tmp_path / output_format, options)
    expected = load_model(architecture, tmp_path / "dense")
    config = EmpConfig()
    found = load_model(architecture, tmp_path / "source", quantization_config=config)
    assert_same((found, expected))
    assert_same((load_model(architecture, tmp_path / "packed"), expected))


def test_a_config_object_is_used(asked: Any, both: Any) -> None:
    folder, more = asked("gpt2")
    config = AutoConfig.from_pretrained(folder)
    found = load_model("gpt2", folder, config=config, **more)
    assert_same((found, both("gpt2")[1]))


def test_a_changed_config_is_used(both: Any) -> None:
    found, expected = both("llama", num_hidden_layers=1)
    assert len(found.model.layers) == 1
    assert_same((found, expected))


@pytest.mark.parametrize("option", [{"use_safetensors": True}, {"local_files_only": True}, {}])
def test_auto_classes_and_plain_options_work(both: Any, option: dict[str, Any]) -> None:
    loader = AutoModelForCausalLM
    assert_same(both("llama", loader=loader, attn_implementation="eager", **option))


@pytest.mark.parametrize(
    ("architecture", "loader", "options"),
    [
        ("llama", AutoModelForCausalLM, {"ignore_mismatched_sizes": True}),
        ("llama", transformers.LlamaForCausalLM, {}),
        ("gpt2", AutoModel, {"dtype": torch.float32}),
        ("mixtral", AutoModelForCausalLM, {"dtype": "auto"}),
    ],
    ids=["sizes", "class", "dtype", "experts"],
)
def test_no_quantization_config_is_as_if_it_was_left_out(
    pruned_model: TinyModel, architecture: str, loader: Any, options: dict[str, Any]
) -> None:
    packed = pruned_model(architecture)
    found = loader.from_pretrained(packed, quantization_config=None, **options)
    dense = pruned_model(architecture, output_format="dense")
    assert_same((found, loader.from_pretrained(dense, **options)))
    config, rest = AutoConfig.from_pretrained(
        packed, quantization_config=None, return_unused_kwargs=True
    )
    assert (config.quantization_config["quant_method"], rest) == ("emp", {})


def test_the_written_config_is_the_original_one_but_for_the_rule(
    asked: Any, tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder, more = asked("mixtral")
    load_model("mixtral", folder, **more).save_pretrained(tmp_path / "saved")
    load_model("mixtral", tiny_model("mixtral")).save_pretrained(tmp_path / "plain")
    saved, plain = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("saved", "plain")
    )
    assert saved.pop("quantization_config")["quant_method"] == "emp"
    assert saved == plain
