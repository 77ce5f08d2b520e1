"""What commands say of a folder that another model was saved to after it was pruned.

Its report, card and figure describe weights that are no longer there.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from support.checkpoints import (
    F,
    H,
    Tensors,
    differing,
    gaussian,
    llama_config,
    load,
    mlp,
    write_checkpoint,
)

from emp_llm import FormatError, PruneOptions, diff, prune, push, unpack, verify
from emp_llm.entrypoints.report import find_report
from emp_llm.evaluation.saving import check_can_save

NORM = "model.norm.weight"
REMEDY = "or delete emp_report.json if another model was saved over it"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = mlp(H, F) | {NORM: gaussian(H)}
    return write_checkpoint(tmp_path / "source", llama_config(H, F), tensors)


def save_over(folder: Path, other: Path) -> None:
    """Leave in a folder what save_pretrained leaves there, if it saves the other one's model."""
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(other / name, folder / name)


@pytest.fixture
def saved_over(source: Path, tmp_path: Path) -> Path:
    """Pruned by β = 1; then a model that was pruned by β = 0.5 was saved to it."""
    prune(source, tmp_path / "folder")
    prune(source, tmp_path / "other", PruneOptions(beta=0.5))
    save_over(tmp_path / "folder", tmp_path / "other")
    return tmp_path / "folder"


@pytest.mark.parametrize(
    "command",
    [
        find_report,
        verify,
        check_can_save,
        lambda folder: unpack(folder, folder.parent / "dense"),
        lambda folder: push(folder, "me/model"),
    ],
    ids=["report", "verify", "eval --save", "unpack", "push"],
)
def test_a_report_of_other_weights_is_refused_with_what_to_do(
    saved_over: Path, command: Callable[[Path], object]
) -> None:
    with pytest.raises(FormatError) as caught:
        command(saved_over)
    assert str(caught.value).endswith(REMEDY)
    assert not (saved_over.parent / "dense").exists()
    (saved_over / "emp_report.json").unlink()
    verify(saved_over)


def test_diff_takes_the_rule_from_the_config_that_was_saved_with_the_weights(
    saved_over: Path, source: Path
) -> None:
    found = diff(saved_over, source)["a"]["rule"]
    assert found is not None
    assert found["beta"] == 0.5


def test_a_dense_model_saved_over_a_packed_one_is_found_by_the_report_alone(
    saved_over: Path, source: Path
) -> None:
    save_over(saved_over, source)
    with pytest.raises(FormatError, match=f"model.safetensors is not the file .*{REMEDY}"):
        find_report(saved_over)
    assert diff(saved_over, source)["a"]["rule"] is None


def test_one_file_in_place_of_shards_is_found_by_the_report_alone(tmp_path: Path) -> None:
    norm, tensors = {NORM: gaussian(H)}, mlp(H, F)
    config = llama_config(H, F)
    prune(write_checkpoint(tmp_path / "shards", config, norm, tensors), tmp_path / "folder")
    for path in (tmp_path / "folder").glob("*.safetensors"):
        path.unlink()
    save_file(norm | tensors, tmp_path / "folder" / "model.safetensors")
    with pytest.raises(FormatError, match=r"model\.safetensors is not the file"):
        find_report(tmp_path / "folder")


@pytest.mark.parametrize("pointer", [False, True], ids=["no weights", "Git LFS"])
def test_a_report_is_shown_without_its_weights(source: Path, tmp_path: Path, pointer: bool) -> None:
    (source / "model_mtp.safetensors").write_bytes(b"a file of its own, which is copied")
    written = prune(source, tmp_path / "folder")
    path = tmp_path / "folder" / "model.safetensors"
    path.unlink()
    if pointer:
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert find_report(tmp_path / "folder")["totals"]["targets"] == written["totals"]["targets"]


# What config.json says of the weights, and what they are


def said(folder: Path, weights: Tensors) -> Path:
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "emp_report.json").unlink()
    return folder


def test_a_packed_config_over_dense_weights_is_refused_and_unpacked(
    source: Path, tmp_path: Path
) -> None:
    prune(source, tmp_path / "folder")
    folder = said(tmp_path / "folder", load(source))
    with pytest.raises(FormatError, match="`emp-llm unpack` writes the ordinary checkpoint"):
        verify(folder)
    unpack(folder, tmp_path / "dense")
    assert differing(load(tmp_path / "dense"), load(source)) == []
    prune(tmp_path / "dense", tmp_path / "pruned")


@pytest.mark.parametrize("command", [verify, lambda folder: push(folder, "me/model")])
def test_packed_weights_that_config_json_does_not_name_are_refused(
    source: Path, tmp_path: Path, command: Callable[[Path], object]
) -> None:
    prune(source, tmp_path / "packed")
    prune(source, tmp_path / "folder", PruneOptions(output_format="dense"))
    folder = said(tmp_path / "folder", load(tmp_path / "packed"))
    with pytest.raises(FormatError, match=r"config\.json has no quantization_config"):
        command(folder)
