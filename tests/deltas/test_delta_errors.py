"""What makes no sense of a delta, and a base that is not the one, is refused in one line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import UP, F, H, files, gaussian, llama_config, load, mlp, write_checkpoint
from support.tampering import edit_json
from support.tuned import tune
from transformers import AutoModelForCausalLM

from emp_llm import (
    CalibrationOptions,
    CheckpointError,
    EmpConfig,
    EmpError,
    FormatError,
    OptionError,
    OutputError,
    PruneOptions,
    prune,
    push,
    unpack,
    verify,
)

TinyModel = Callable[..., Path]


@pytest.fixture
def base(tiny_model: TinyModel, tmp_path: Path) -> Path:
    copy = shutil.copytree(tiny_model("llama"), tmp_path / "base")
    return Path(copy)


@pytest.fixture
def tuned(base: Path, tmp_path: Path) -> Path:
    return tune(base, tmp_path / "tuned")


@pytest.fixture
def delta(base: Path, tuned: Path, tmp_path: Path) -> Path:
    prune(tuned, tmp_path / "delta", base=base)
    return tmp_path / "delta"


def refusal(kind: type[EmpError], function: Callable[..., object], *arguments, **options) -> str:
    with pytest.raises(kind) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"criterion": "wanda", "calibration": CalibrationOptions(text="a")}, "scores from data"),
        ({"criterion": "random"}, "scores from data"),
        ({"allocate": "uniform"}, "scores from data"),
        ({"output_format": "dense"}, "always packed"),
        ({"targets": "none"}, "no difference"),
        ({"granularity": "layer"}, "row by row"),
    ],
)
def test_options_that_make_no_sense_of_differences(
    base: Path, tuned: Path, tmp_path: Path, options: dict[str, object], named: str
) -> None:
    out = tmp_path / "out"
    found = refusal(OptionError, prune, tuned, out, PruneOptions(**options), base=base)
    assert found.startswith("base: ")
    assert named in found
    assert not out.exists()


def test_a_model_that_is_its_own_base(tuned: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tuned)
    for same in (tuned, tmp_path / "link"):
        found = refusal(CheckpointError, prune, tuned, tmp_path / "out", base=same)
        assert found.startswith(f"{same}: is the model itself, to which there is no difference")
    assert not (tmp_path / "out").exists()


def test_sources_that_are_to_be_discarded(base: Path, tuned: Path, tmp_path: Path) -> None:
    given = {"base": base, "discard_source": True}
    assert "read twice" in refusal(OptionError, prune, tuned, tmp_path / "out", **given)


def test_a_base_of_another_architecture(tiny_model: TinyModel, tuned: Path, tmp_path: Path) -> None:
    found = refusal(CheckpointError, prune, tuned, tmp_path / "out", base=tiny_model("gpt2"))
    assert "is of model type 'gpt2'" in found
    assert "fine-tuned from" in found
    assert not (tmp_path / "out").exists()


def test_a_base_of_other_shapes(tuned: Path, tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "wider", llama_config(H, F + 1), mlp(H, F + 1))
    found = refusal(CheckpointError, prune, tuned, tmp_path / "out", base=base)
    assert f"is BF16 [{H}, {F + 1}], in" in found


def test_a_base_without_a_target(base: Path, tuned: Path, tmp_path: Path) -> None:
    tensors = load(base)
    del tensors[UP]
    save_file(tensors, base / "model.safetensors")
    found = refusal(CheckpointError, prune, tuned, tmp_path / "out", base=base)
    assert f"tensor '{UP}' is not there" in found


def test_a_base_with_a_tensor_that_the_model_lacks(base: Path, tuned: Path, tmp_path: Path) -> None:
    save_file(load(base) | {"model.extra.weight": gaussian(8, H)}, base / "model.safetensors")
    found = refusal(CheckpointError, prune, tuned, tmp_path / "out", base=base)
    assert "has a tensor 'model.extra.weight'" in found


def test_a_base_that_is_packed(base: Path, tuned: Path, tmp_path: Path) -> None:
    prune(base, tmp_path / "packed")
    found = refusal(CheckpointError, prune, tuned, tmp_path / "out", base=tmp_path / "packed")
    assert "is packed or quantized" in found


def test_a_base_that_is_not_in_safetensors(base: Path, tuned: Path, tmp_path: Path) -> None:
    torch.save(load(base), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    found = refusal(CheckpointError, prune, tuned, tmp_path / "out", base=base)
    assert "pytorch_model.bin is not in the safetensors format" in found


def test_an_output_that_is_the_base(base: Path, tuned: Path) -> None:
    before = files(base)
    refusal(OutputError, prune, tuned, base, base=base, overwrite=True)
    assert files(base) == before


def test_an_unpacked_delta_over_its_base(base: Path, delta: Path) -> None:
    before = files(base)
    refusal(OutputError, unpack, delta, base, overwrite=True)
    assert files(base) == before


def stated_base(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["base"]


def state_base(folder: Path, base: object) -> None:
    def edit(config: dict) -> None:
        config["quantization_config"]["base"] = base

    edit_json(folder / "config.json", edit)


def load_delta(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder)


def unpack_delta(folder: Path) -> None:
    unpack(folder, folder.parent / "whole")


each_reader = pytest.mark.parametrize("read", [load_delta, unpack_delta])


@each_reader
def test_a_base_of_which_one_weight_has_changed(
    base: Path, delta: Path, read: Callable[[Path], None]
) -> None:
    tensors = load(base)
    tensors[UP][3, 4] += 1
    save_file(tensors, base / "model.safetensors")
    found = refusal(FormatError, read, delta)
    assert f"{base}: is not the base of {delta}" in found
    assert not (delta.parent / "whole").exists()


@each_reader
def test_a_base_that_is_gone(base: Path, delta: Path, read: Callable[[Path], None]) -> None:
    base.rename(base.parent / "moved")
    found = refusal(CheckpointError, read, delta)
    assert f"is the difference to the model in {base}, which is not there" in found
    state_base(delta, {**stated_base(delta), "model": "../moved"})
    read(delta)


@each_reader
@pytest.mark.parametrize("model", ["a\0b", "a" * 5000, "\n"])
def test_a_config_that_names_a_base_by_what_is_no_path(
    delta: Path, model: str, read: Callable[[Path], None]
) -> None:
    state_base(delta, {**stated_base(delta), "model": model})
    assert "which is not there" in refusal(CheckpointError, read, delta)


@each_reader
@pytest.mark.parametrize("stated", [None, "x", {"model": 3, "revision": None, "hash": ""}])
def test_a_config_that_names_no_base(
    delta: Path, stated: object, read: Callable[[Path], None]
) -> None:
    state_base(delta, stated)
    assert "names model, revision and hash" in refusal(FormatError, read, delta)


def test_a_delta_whose_base_has_moved_is_whole_with_another_path_and_with_no_other_edit(
    base: Path, tuned: Path, delta: Path
) -> None:
    base.rename(base.parent / "moved")
    state_base(delta, {**stated_base(delta), "model": "../moved"})
    assert verify(delta, against=tuned)["masks_derived"] is True
    edit_json(delta / "config.json", lambda config: config.update(rms_norm_eps=0.5))
    assert "config.json is not as it was written" in refusal(FormatError, verify, delta)


def test_a_delta_whose_base_was_in_a_folder_and_is_said_to_be_on_the_hub(delta: Path) -> None:
    state_base(delta, {**stated_base(delta), "model": "me/base", "revision": "a" * 40})
    assert "config.json is not as it was written" in refusal(FormatError, verify, delta)


def test_an_unpacked_delta_is_not_verified_but_the_delta_is(delta: Path, tmp_path: Path) -> None:
    unpack(delta, tmp_path / "whole")
    found = refusal(CheckpointError, verify, tmp_path / "whole")
    assert "where that is a delta, give the delta itself" in found
    assert verify(delta)["hashes"] is True


def test_another_model_than_the_delta_was_made_from(
    base: Path, delta: Path, tmp_path: Path
) -> None:
    other = tune(base, tmp_path / "other", seed=8)
    assert "but pruning" in refusal(FormatError, verify, delta, against=other)


@pytest.mark.parametrize("asked", [EmpConfig(), EmpConfig(keep_packed=True)])
def test_a_delta_cannot_be_pruned_or_kept_packed_while_it_is_loaded(
    delta: Path, asked: EmpConfig
) -> None:
    load = AutoModelForCausalLM.from_pretrained
    assert "this is a delta" in refusal(OptionError, load, delta, quantization_config=asked)


def test_a_delta_that_is_offloaded_to_the_disk(delta: Path, tmp_path: Path) -> None:
    given = {"device_map": {"": "disk"}, "offload_folder": tmp_path / "disk"}
    load = AutoModelForCausalLM.from_pretrained
    assert "to the disk" in refusal(OptionError, load, delta, **given)


def test_a_delta_as_source(base: Path, delta: Path, tmp_path: Path) -> None:
    assert "the checkpoint is packed" in refusal(
        CheckpointError, prune, delta, tmp_path / "out", base=base
    )


def test_a_delta_to_a_folder_is_not_pushed(delta: Path) -> None:
    assert "push the base" in refusal(CheckpointError, push, delta, "me/delta")
