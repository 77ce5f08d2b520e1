"""Small files, index and headers, and files that are no part of the checkpoint."""

import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.tampering import agree, edit_json
from support.written_folders import FIRST, NORM, SECOND, refusal

from emp_llm import CheckpointError, verify


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_small_file_that_changed_is_named(packed: Path, name: str) -> None:
    data = (packed / name).read_bytes()
    (packed / name).write_bytes(data.replace(b"a", b"e", 1))
    assert f"{name} is not as it was written" in refusal(packed)


def test_a_small_file_that_is_missing_is_named(packed: Path) -> None:
    (packed / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in refusal(packed)


def test_card_and_evaluation_may_be_written_again_and_other_files_are_told(packed: Path) -> None:
    (packed / "README.md").write_text("# Another card")
    (packed / "emp_eval.json").write_text("{}")
    (packed / "notes").mkdir()
    (packed / "notes" / "a.txt").write_text("mine")
    (packed / "checkpoint-5").mkdir()
    (packed / "checkpoint-5" / "model.safetensors").write_bytes(b"of a training")
    (packed / ".cache").mkdir()
    (packed / ".cache" / "b.txt").write_text("hidden")
    others = ["checkpoint-5/model.safetensors", "notes/a.txt"]
    assert verify(packed)["other_files"] == others


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors.bak.safetensors",
        "adapter_model.safetensors",
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "other.safetensors.index.json",
    ],
)
def test_weights_that_are_no_part_of_the_checkpoint_are_refused(packed: Path, name: str) -> None:
    (packed / name).write_bytes(b"weights")
    assert f"{name} is not a part of the checkpoint" in refusal(packed)


@pytest.mark.parametrize("report", [True, False])
def test_an_index_that_lacks_a_tensor_is_refused(packed: Path, report: bool) -> None:
    index = packed / "model.safetensors.index.json"
    edit_json(index, lambda content: content["weight_map"].pop(NORM))
    if report:
        agree(packed)
    else:
        (packed / "emp_report.json").unlink()
    assert f"says tensor {NORM!r} is in None; it is in {FIRST}" in refusal(packed)


def test_an_index_with_another_size_is_refused(packed: Path) -> None:
    index = packed / "model.safetensors.index.json"
    edit_json(index, lambda content: content["metadata"].update(total_size=5))
    agree(packed)
    assert "total_size is 5, the tensors have" in refusal(packed)


def test_an_index_with_other_metadata_is_refused(packed: Path) -> None:
    index = packed / "model.safetensors.index.json"
    edit_json(index, lambda content: content["metadata"].update(more="x"))
    assert "model.safetensors.index.json has" in refusal(packed)


@pytest.mark.parametrize("output_format", ["packed", "dense"])
def test_another_header_with_the_same_tensors_is_refused(
    written: dict[str, Path], tmp_path: Path, output_format: str
) -> None:
    folder = Path(shutil.copytree(written[output_format], tmp_path / "copy"))
    with safe_open(folder / SECOND, "pt") as shard:
        metadata = shard.metadata()
    save_file(load_file(folder / SECOND), folder / SECOND, {**(metadata or {}), "format": "tf"})
    assert f"{SECOND} has" in refusal(folder)


def test_what_a_run_that_did_not_end_has_left_is_told(packed: Path) -> None:
    (packed / ".emp-llm-unfinished").mkdir()
    (packed / ".emp-llm-unfinished" / ".model.safetensors.unfinished").write_bytes(b"half")
    assert verify(packed)["unfinished_run"]


def test_a_run_that_did_not_end_is_no_folder(packed: Path) -> None:
    (packed / ".emp-llm-unfinished").mkdir()
    (packed / "config.json").unlink()
    assert "holds nothing but an unfinished run" in refusal(packed, CheckpointError)
