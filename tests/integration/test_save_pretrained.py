"""A folder that save_pretrained wrote is packed and its config.json says so, or neither."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.architectures import ARCHITECTURES as TINY
from support.checkpoints import differing, load
from support.loading import load_model, state
from transformers import AutoConfig, AutoModel, LlavaConfig, LlavaForConditionalGeneration

from emp_llm import OutputError, densify, unpack, verify
from emp_llm.report.file_names import REPORT_NAME

TinyModel = Callable[..., Path]

ARCHITECTURES = ["llama", "llama-tied", "gpt2", "mixtral", "gpt-oss", "t5", "bert"]
OWN_NAMES = {"save_original_format": False}


def says_packed(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text())
    return any("quantization_config" in part for part in (config, config.get("text_config", {})))


def packed_tensors(folder: Path) -> int:
    return sum(name.endswith(".emp_rows") for name in load(folder))


@pytest.fixture
def unpacked(pruned_model: TinyModel) -> Callable[[str], Any]:
    """Loads a packed model."""
    return lambda architecture: load_model(architecture, pruned_model(architecture))


# Under the parameters' own names


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_are_packed_under_their_own_names(
    unpacked: Any, tmp_path: Path, architecture: str
) -> None:
    model = unpacked(architecture)
    model.save_pretrained(tmp_path / "packed", **OWN_NAMES)
    assert verify(tmp_path / "packed")["pruned_tensors"] == packed_tensors(tmp_path / "packed") > 0
    assert differing(state(load_model(architecture, tmp_path / "packed")), state(model)) == []
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    densify(model).save_pretrained(tmp_path / "dense", **OWN_NAMES)
    assert differing(load(tmp_path / "unpacked"), load(tmp_path / "dense")) == []


def test_merged_experts_are_packed_as_pruning_the_merged_experts_packs_them(
    unpacked: Any, tiny_model: TinyModel, tmp_path: Path
) -> None:
    load_model("mixtral", tiny_model("mixtral")).save_pretrained(tmp_path / "merged", **OWN_NAMES)
    unpacked("mixtral").save_pretrained(tmp_path / "packed", max_shard_size="8KB", **OWN_NAMES)
    found = verify(tmp_path / "packed", against=tmp_path / "merged")
    assert (found["pruned_tensors"], found["masks_derived"]) == (4, True)


def test_experts_on_the_disk_are_packed_under_their_own_names(
    unpacked: Any, pruned_model: TinyModel, tmp_path: Path
) -> None:
    parts = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    model = load_model(
        "mixtral",
        pruned_model("mixtral"),
        device_map=dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk"},
        offload_folder=tmp_path / "disk",
    )
    with pytest.warns(UserWarning, match="offloaded modules"):
        model.save_pretrained(tmp_path / "packed", **OWN_NAMES)
    unpacked("mixtral").save_pretrained(tmp_path / "from memory", **OWN_NAMES)
    assert differing(load(tmp_path / "packed"), load(tmp_path / "from memory")) == []


def test_a_model_is_saved_as_ever_after_it_was_saved_under_its_own_names(
    unpacked: Any, pruned_model: TinyModel, tmp_path: Path
) -> None:
    model = unpacked("mixtral")
    model.save_pretrained(tmp_path / "own names", **OWN_NAMES)
    model.save_pretrained(tmp_path / "saved")
    assert differing(load(tmp_path / "saved"), load(pruned_model("mixtral"))) == []


# Where nothing can be packed


@pytest.mark.parametrize("options", [{}, OWN_NAMES], ids=["as in the checkpoint", "own names"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_float64_is_saved_as_an_ordinary_checkpoint_with_a_warning(
    unpacked: Any, tmp_path: Path, architecture: str, options: Any
) -> None:
    model = unpacked(architecture).double()
    with pytest.warns(UserWarning, match="ordinary checkpoint: float64 is not packed; cast"):
        model.save_pretrained(tmp_path / "saved", **options)
    assert (says_packed(tmp_path / "saved"), packed_tensors(tmp_path / "saved")) == (False, 0)
    again = load_model(architecture, tmp_path / "saved")
    assert differing(state(again), state(model)) == []
    model.bfloat16().save_pretrained(tmp_path / "cast", **options)
    assert verify(tmp_path / "cast")["pruned_tensors"] > 0


def test_a_model_of_which_some_weights_are_float64_has_the_others_packed(
    unpacked: Any, tmp_path: Path
) -> None:
    model = unpacked("llama")
    model.model.layers[0].double()
    model.save_pretrained(tmp_path)
    assert verify(tmp_path)["pruned_tensors"] == 3


@pytest.mark.parametrize(
    "some",
    [lambda name: "norm" in name, lambda name: name == "model.embed_tokens.weight"],
    ids=["norms", "embedding"],
)
def test_a_state_dict_without_pruned_parameters_is_saved_as_it_is(
    unpacked: Any, tmp_path: Path, some: Any
) -> None:
    model = unpacked("llama")
    given = {name: tensor for name, tensor in model.state_dict().items() if some(name)}
    with pytest.warns(UserWarning, match="none of the parameters that were pruned or packed is"):
        model.save_pretrained(tmp_path, state_dict=dict(given))
    assert not says_packed(tmp_path)
    assert differing(load(tmp_path), given) == []


@pytest.mark.parametrize(
    ("architecture", "part"),
    [("llama", "model"), ("gpt2", "transformer"), ("bert", "bert"), ("t5", "encoder")],
)
def test_a_part_of_a_packed_model_is_saved_as_an_ordinary_checkpoint(
    unpacked: Any, tmp_path: Path, architecture: str, part: str
) -> None:
    inner = getattr(unpacked(architecture), part)
    inner.save_pretrained(tmp_path)
    assert (says_packed(tmp_path), packed_tensors(tmp_path)) == (False, 0)
    assert differing(load(tmp_path), state(inner)) == []


def test_a_model_made_from_the_config_of_a_packed_one_is_saved_as_an_ordinary_one(
    pruned_model: TinyModel, tmp_path: Path
) -> None:
    config = AutoConfig.from_pretrained(pruned_model("mixtral"))
    for name, options in ("saved", {}), ("own names", OWN_NAMES):
        AutoModel.from_config(config).save_pretrained(tmp_path / name, **options)
        assert not says_packed(tmp_path / name)
    assert "layers.0.block_sparse_moe.experts.0.w1.weight" in load(tmp_path / "saved")
    assert "quantization_config" in config.to_dict()


def test_a_model_composed_with_a_packed_one_is_saved_as_an_ordinary_one(
    unpacked: Any, tmp_path: Path
) -> None:
    llava = dict(TINY["llava"][2])
    config = LlavaConfig(**llava | {"text_config": unpacked("llama").config})
    LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
    assert not says_packed(tmp_path)


def test_a_model_whose_config_no_longer_says_packed_is_saved_as_an_ordinary_one(
    unpacked: Any, tmp_path: Path
) -> None:
    model = unpacked("mixtral")
    del model.config.quantization_config
    model.save_pretrained(tmp_path)
    assert packed_tensors(tmp_path) == 0
    assert differing(state(load_model("mixtral", tmp_path)), state(model)) == []


# Where saving fails


@pytest.mark.parametrize("before", [None, "{}"], ids=["new folder", "older config"])
def test_a_save_that_fails_leaves_the_config_as_it_was(
    unpacked: Any, tmp_path: Path, before: str | None
) -> None:
    path = tmp_path / "config.json"
    if before is not None:
        path.write_text(before)
    with pytest.raises(OutputError, match="is on the meta device, where there are no weights"):
        unpacked("llama").to("meta").save_pretrained(tmp_path)
    assert (path.read_text() if path.is_file() else None) == before


# Over a pruned folder


@pytest.mark.parametrize("dense", [False, True], ids=["packed", "dense"])
def test_saving_over_a_pruned_folder_warns_of_its_report(
    unpacked: Any, tmp_path: Path, dense: bool
) -> None:
    for name in ("README.md", REPORT_NAME):
        (tmp_path / name).write_text("{}")
    model = densify(unpacked("llama")) if dense else unpacked("llama")
    with pytest.warns(
        UserWarning, match=r"README.md, emp_report.json describe the weights that"
    ) as w:
        model.save_pretrained(tmp_path)
    assert [Path(warning.filename) for warning in w] == [Path(__file__)]
    assert (tmp_path / REPORT_NAME).read_text() == "{}"


def test_what_does_not_replace_the_weights_does_not_warn(unpacked: Any, tmp_path: Path) -> None:
    (tmp_path / REPORT_NAME).write_text("{}")
    model = unpacked("llama")
    model.config.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path, is_main_process=False)
