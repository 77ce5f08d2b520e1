"""A bad input to from_pretrained is one clear line of the right kind, and leaves nothing behind."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.architectures import make_model
from support.checkpoints import bits, load
from support.expected_targets import EXPECTED
from support.loading import Traces, load_model
from support.wide_models import EMBED, WideModel
from transformers import AutoConfig, BitsAndBytesConfig

from emp_llm import CheckpointError, EmpConfig, FormatError, OptionError

TinyModel = Callable[..., Path]

ARCHITECTURES = ["llama", "gpt2", "mixtral", "gpt-oss"]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No thread, no open file and no changed setting is left, whatever failed."""
    traces = Traces()
    yield
    assert traces.left() == set()


@pytest.fixture
def packed(pruned_model: TinyModel, tmp_path: Path) -> Any:
    """Copies a packed folder of one file, its tensors changed by a function."""

    def make(architecture: str, change: Callable[[dict[str, torch.Tensor], str], Any]) -> Path:
        folder = Path(shutil.copytree(pruned_model(architecture), tmp_path / "packed"))
        tensors = load(folder)
        change(tensors, EXPECTED[architecture].mlp[-1])
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def refusal(folder: Any, kind: type[Exception], architecture: str = "llama", **options: Any) -> str:
    with pytest.raises(kind) as caught:
        load_model(architecture, folder, **options)
    assert type(caught.value) is kind
    message = str(caught.value)
    assert "\n" not in message
    return message


def change_config(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


# Planes that are missing


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ((".emp_rows",), "packed tensor {0!r} lacks its plane '{0}.emp_rows'"),
        ((".emp_meta",), "'{0}.emp_rows' is there without its other planes"),
        (("",), "packed tensor {0!r} lacks its plane {0!r}"),
        ((".emp_rows", ".emp_meta"), "packed tensor {0!r} lacks its planes"),
        (("", ".emp_meta"), "'{0}.emp_rows' is there without its other planes"),
        (("", ".emp_rows"), "packed tensor {0!r} lacks its plane {0!r}"),
    ],
    ids=["rows", "meta", "records", "rows and meta", "records and meta", "records and rows"],
)
def test_a_missing_plane_is_named(
    packed: Any, architecture: str, missing: tuple[str, ...], reason: str
) -> None:
    def take_away(tensors: dict[str, torch.Tensor], name: str) -> None:
        for suffix in missing:
            del tensors[name + suffix]

    message = refusal(packed(architecture, take_away), FormatError, architecture)
    assert reason.format(EXPECTED[architecture].mlp[-1]) in message


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt-oss"])
def test_a_tensor_that_is_missing_altogether_is_not_made_up(packed: Any, architecture: str) -> None:
    def take_away(tensors: dict[str, torch.Tensor], name: str) -> None:
        for suffix in ("", ".emp_rows", ".emp_meta"):
            del tensors[name + suffix]

    message = refusal(packed(architecture, take_away), FormatError, architecture)
    assert f"has no weights for {EXPECTED[architecture].mlp[-1]!r}" in message


def test_an_expert_that_is_missing_altogether_is_not_made_up(packed: Any) -> None:
    def take_away(tensors: dict[str, torch.Tensor], name: str) -> None:
        for suffix in ("", ".emp_rows", ".emp_meta"):
            del tensors[name + suffix]

    # transformers' own words: three experts cannot be merged where there are four
    refusal(packed("mixtral", take_away), RuntimeError, "mixtral")


# Planes that are not what they must be


def shorter(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name][:-16].clone()


def longer(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = torch.cat([tensors[name], torch.zeros(16, dtype=torch.uint8)])


def empty(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name][:0].clone()


def short_table(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name + ".emp_rows"] = tensors[name + ".emp_rows"][:-16].clone()


def short_meta(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name + ".emp_meta"] = tensors[name + ".emp_meta"][:4].clone()


def other_mask(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name][0] ^= 1


def ones(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name].fill_(255)


def other_table(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name + ".emp_rows"][0] += 1


def next_version(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name + ".emp_meta"][0] = 3


def floats(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name] = tensors[name].float()


DAMAGED: dict[Callable[..., None], str] = {
    shorter: "is damaged: its records have",
    longer: "is damaged: its records have",
    empty: "is damaged: its records have 0 bytes",
    short_table: "is damaged: its row table has",
    short_meta: "its emp_meta [1, 1, ",
    other_mask: "is damaged: row 0: its mask names",
    other_table: "is damaged: row 0: its mask names",
    next_version: "is packed in version 3 of the format; this emp-llm reads versions 1 to 2",
    floats: "is F32",
}


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.parametrize("change", DAMAGED, ids=lambda it: it.__name__)
def test_a_damaged_plane_is_named(packed: Any, architecture: str, change: Any) -> None:
    message = refusal(packed(architecture, change), FormatError, architecture)
    assert message.startswith("model.safetensors: ")
    assert EXPECTED[architecture].mlp[-1] in message
    assert DAMAGED[change] in message


@pytest.mark.parametrize("change", [ones, other_table, shorter], ids=lambda it: it.__name__)
@pytest.mark.parametrize("whole", [False, True])
def test_damage_is_named_alike_where_weights_stay_packed(
    wide_packed: WideModel, tmp_path: Path, whole: bool, change: Any
) -> None:
    folder = Path(shutil.copytree(wide_packed("llama"), tmp_path / "packed"))
    tensors = load(folder)
    name = EMBED if whole else EXPECTED["llama"].mlp[-1]
    change(tensors, name)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    expected = refusal(folder, FormatError)
    assert f"packed tensor {name!r} is damaged" in expected
    assert refusal(folder, FormatError, quantization_config=EmpConfig(keep_packed=True)) == expected


@pytest.mark.parametrize("suffix", [".emp_rows", ".emp_meta"])
def test_a_plane_left_over_is_named(packed: Any, suffix: str) -> None:
    left_over = "model.norm.weight" + suffix

    def add(tensors: dict[str, torch.Tensor], name: str) -> None:
        tensors[left_over] = tensors[name + suffix].clone()

    assert left_over.removesuffix(".emp_meta") in refusal(packed("llama", add), FormatError)


def test_a_packed_tensor_of_another_shape_is_an_error(packed: Any) -> None:
    def swap(tensors: dict[str, torch.Tensor], name: str) -> None:
        other = name.replace("down_proj", "up_proj")
        for suffix in ("", ".emp_rows", ".emp_meta"):
            tensors[name + suffix] = tensors[other + suffix].clone()

    name = EXPECTED["llama"].mlp[-1]
    assert "down_proj" in name
    with pytest.raises(RuntimeError, match="mismatch"):
        load_model("llama", packed("llama", swap))


# The configuration


@pytest.mark.parametrize("version", [3, 0, "1", None])
def test_a_config_of_another_version_is_refused(packed: Any, version: Any) -> None:
    folder = packed("llama", lambda *_: None)
    method = {"quant_method": "emp", "format_version": version}
    change_config(folder, quantization_config=method)
    message = refusal(folder, FormatError)
    assert (
        f"packed in version {version} of the format; this emp-llm reads versions 1 to 2" in message
    )


def test_a_packed_folder_whose_config_was_replaced_is_an_error(
    packed: Any, tiny_model: TinyModel
) -> None:
    folder = packed("llama", lambda *_: None)
    shutil.copy(tiny_model("llama") / "config.json", folder)
    with pytest.raises(RuntimeError, match="mismatch"):
        load_model("llama", folder)
    message = refusal(folder, CheckpointError, quantization_config=EmpConfig())
    assert "the weights and the config do not belong together" in message


@pytest.mark.parametrize(
    "given",
    [EmpConfig(), EmpConfig(beta=0.5).to_dict(), BitsAndBytesConfig(load_in_8bit=True)],
    ids=["EmpConfig", "dictionary", "BitsAndBytesConfig"],
)
def test_a_config_for_a_model_that_is_packed_already_is_an_error(
    pruned_model: TinyModel, given: Any
) -> None:
    message = refusal(pruned_model("llama"), ValueError, quantization_config=given)
    assert "pruned and packed" in message
    assert "leave quantization_config out" in message


def test_a_quantized_checkpoint_is_not_pruned(tiny_model: TinyModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "quantized"))
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    message = refusal(folder, ValueError, quantization_config=EmpConfig())
    assert "GPTQConfig" in message
    assert "EmpConfig" in message


# The checkpoint


@pytest.mark.parametrize(
    ("granularity", "value"),
    [("row", float("nan")), ("layer", float("inf")), ("model", float("-inf"))],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_target_that_is_not_finite_is_named_with_its_row(
    tiny_model: TinyModel, tmp_path: Path, architecture: str, granularity: Any, value: float
) -> None:
    folder = Path(shutil.copytree(tiny_model(architecture), tmp_path / "source"))
    tensors, name = load(folder), EXPECTED[architecture].mlp[-1]
    place = (0,) * (tensors[name].ndim - 2)
    tensors[name][(*place, 3, 5)] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = EmpConfig(granularity=granularity)
    message = refusal(folder, CheckpointError, architecture, quantization_config=config)
    row = 5 if name in EXPECTED[architecture].transposed else 3
    assert f"{name!r} row {row} holds NaN or infinity" in message


def test_what_is_not_finite_outside_the_targets_is_loaded(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model("llama"), tmp_path / "source"))
    tensors = load(folder)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = load_model("llama", folder, quantization_config=EmpConfig())
    found = model.get_parameter("model.norm.weight").detach()
    assert bits(found) == bits(tensors["model.norm.weight"])


@pytest.mark.parametrize("left", [0, 7, 100, -1])
@pytest.mark.parametrize("way", ["pruned", "unpacked"])
def test_a_truncated_file_is_named(
    tiny_model: TinyModel, pruned_model: TinyModel, tmp_path: Path, way: str, left: int
) -> None:
    source = tiny_model("llama") if way == "pruned" else pruned_model("llama")
    folder = Path(shutil.copytree(source, tmp_path / "cut"))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    options = {"quantization_config": EmpConfig()} if way == "pruned" else {}
    assert "model.safetensors" in refusal(folder, CheckpointError, **options)


@pytest.mark.parametrize("way", ["pruned", "unpacked"])
def test_a_missing_shard_is_named(
    tiny_model: TinyModel, pruned_model: TinyModel, tmp_path: Path, way: str
) -> None:
    source = (
        tiny_model("llama", sharded=True)
        if way == "pruned"
        else pruned_model("llama", sharded=True)
    )
    folder = Path(shutil.copytree(source, tmp_path / "part"))
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.unlink()
    options = {"quantization_config": EmpConfig()} if way == "pruned" else {}
    with pytest.raises((CheckpointError, OSError), match=last.name) as caught:
        load_model("llama", folder, **options)
    assert "\n" not in str(caught.value)


def test_weights_of_torch_that_cannot_be_read_safely_are_refused(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    shutil.copy(tiny_model("llama") / "config.json", tmp_path)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "pytorch_model.bin")
    message = refusal(tmp_path, CheckpointError, quantization_config=EmpConfig())
    assert "pytorch_model.bin: its pickle calls torch.nn.modules.linear.Linear" in message


def test_a_state_dict_is_refused(tiny_model: TinyModel) -> None:
    config = AutoConfig.from_pretrained(tiny_model("llama"))
    options = {
        "config": config,
        "state_dict": make_model("llama").state_dict(),
        "quantization_config": EmpConfig(),
    }
    assert "state_dict" in refusal(None, CheckpointError, **options)


def test_names_that_a_wrapper_has_changed_are_refused_with_its_name(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_model("llama"), tmp_path / "source"))
    tensors = {f"_orig_mod.{name}": tensor for name, tensor in load(source).items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'_orig_mod\.', which torch\.compile adds"):
        load_model("llama", source, quantization_config=EmpConfig())


def test_targets_that_match_nothing_are_refused(tiny_model: TinyModel) -> None:
    config = EmpConfig(targets="no_such_layer")
    message = refusal(tiny_model("llama"), CheckpointError, quantization_config=config)
    assert "no_such_layer" in message


@pytest.mark.parametrize("given", [{}, {"quantization_config": EmpConfig()}], ids=["plain", "emp"])
def test_a_folder_that_is_not_there_is_named(tmp_path: Path, given: dict[str, Any]) -> None:
    with pytest.raises(OSError, match="nowhere"):
        load_model("llama", tmp_path / "nowhere", **given)


def test_a_good_load_after_a_failed_one_is_as_any_other(
    packed: Any, pruned_model: TinyModel
) -> None:
    with pytest.raises(FormatError):
        load_model("llama", packed("llama", other_mask))
    found = load_model("llama", pruned_model("llama"))
    expected = load(pruned_model("llama", output_format="dense"))
    name = EXPECTED["llama"].mlp[-1]
    assert bits(found.get_parameter(name).detach()) == bits(expected[name])


# Tensor parallelism


@pytest.mark.parametrize("split", [{"tp_size": 2}, {"tp_size": 1, "fsdp_size": 2}])
@pytest.mark.parametrize("way", ["pruned", "unpacked"])
def test_weights_split_over_processes_are_refused_with_the_reason(
    tiny_model: TinyModel, pruned_model: TinyModel, way: str, split: dict[str, Any]
) -> None:
    from transformers.distributed.configuration_utils import DistributedConfig

    source = tiny_model("llama") if way == "pruned" else pruned_model("llama")
    config = AutoConfig.from_pretrained(source)
    config.distributed_config = DistributedConfig(**split)
    options = {"quantization_config": EmpConfig()} if way == "pruned" else {}
    message = refusal(source, OptionError, config=config, **options)
    assert "(over 2 processes)" in message
    assert "a row is pruned and unpacked as a whole: load with device_map instead" in message
