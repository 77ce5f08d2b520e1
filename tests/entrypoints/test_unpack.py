"""Unpacking gives the folder that pruning to dense would have written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from support.checkpoints import (
    F,
    H,
    differing,
    files,
    llama_config,
    load,
    mlp,
    pruned_by_rule,
    write_checkpoint,
)

from emp_llm import CheckpointError, FormatError, PruneOptions, prune, unpack

TinyModel = Callable[..., Path]


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    source = write_checkpoint(tmp_path / "source", llama_config(H, F), mlp(H, F))
    prune(source, tmp_path / "packed")
    return tmp_path / "packed"


@pytest.mark.parametrize("granularity", ["row", "layer", "model"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "gpt-oss", "t5"])
def test_an_unpacked_folder_is_the_dense_one_file_for_file(
    tiny_model: TinyModel, tmp_path: Path, architecture: str, granularity: str
) -> None:
    source = tiny_model(architecture, sharded=True)
    prune(source, tmp_path / "packed", PruneOptions(granularity=granularity))
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    dense = PruneOptions(granularity=granularity, output_format="dense")
    prune(source, tmp_path / "dense", dense)
    assert files(tmp_path / "unpacked") == files(tmp_path / "dense")


def test_an_unpacked_folder_is_the_dense_one_with_card_and_small_files(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", llama_config(H, F), mlp(H, F))
    (source / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (source / "tokenizer.json").write_text("{}")
    prune(source, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    prune(source, tmp_path / "dense", PruneOptions(output_format="dense"))
    assert files(tmp_path / "unpacked") == files(tmp_path / "dense")


def test_unpacking_does_not_depend_on_threads_and_blocks(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpack(packed, tmp_path / "once", threads=1)
    monkeypatch.setattr("emp_llm.tensors.geometry.ROW_BLOCK_BYTES", 50)
    for threads in (1, 2, 5):
        unpack(packed, tmp_path / str(threads), threads=threads)
        assert files(tmp_path / str(threads)) == files(tmp_path / "once")


@pytest.mark.parametrize("block_bytes", [1, 100])
def test_transposed_tensors_are_unpacked_block_by_block(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    prune(tiny_model("gpt-oss"), tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "whole")
    monkeypatch.setattr("emp_llm.tensors.geometry.TRANSPOSED_ROW_BLOCK_BYTES", block_bytes)
    unpack(tmp_path / "packed", tmp_path / "blocks")
    assert files(tmp_path / "blocks") == files(tmp_path / "whole")


def test_a_folder_without_its_report_can_be_unpacked(packed: Path, tmp_path: Path) -> None:
    (packed / "emp_report.json").unlink()
    (packed / "README.md").unlink()
    unpack(packed, tmp_path / "dense")
    expected = pruned_by_rule(mlp(H, F), mlp(H, F), beta=1.0, granularity="row")
    assert differing(load(tmp_path / "dense"), expected) == []


def test_what_unpack_returns_adds_up(packed: Path, tmp_path: Path) -> None:
    summary = unpack(packed, tmp_path / "dense")
    assert summary == {
        "packed_tensors": 3,
        "tensors": 3,
        "bytes_before": sum(tensor.nbytes for tensor in load(packed).values()),
        "bytes_after": 3 * H * F * 2,
        "carried": {"files": 0, "bytes": 0},
        "left_behind": [],
    }


def test_a_damaged_tensor_is_named_and_no_folder_is_left(packed: Path, tmp_path: Path) -> None:
    tensors = load(packed)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][0] ^= 1  # a bit of the first row's mask: one weight more or less
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(FormatError, match=r"model\.safetensors.*up_proj.*row 0"):
        unpack(packed, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize("other", [None, "odd"], ids=["one less", "another name"])
def test_a_report_of_other_tensors_is_refused(
    packed: Path, tmp_path: Path, other: str | None
) -> None:
    path = packed / "emp_report.json"
    report = json.loads(path.read_text())
    fields = report["tensors"].pop("model.layers.0.mlp.up_proj.weight")
    report["tensors"] |= {other: fields} if other else {}
    path.write_text(json.dumps(report))
    with pytest.raises(FormatError, match=r"and the shards differ on tensor"):
        unpack(packed, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


def test_a_plane_that_is_missing_is_named(packed: Path, tmp_path: Path) -> None:
    tensors = load(packed)
    del tensors["model.layers.0.mlp.up_proj.weight.emp_rows"]
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(FormatError, match=r"up_proj\.weight\.emp_rows"):
        unpack(packed, tmp_path / "dense")


def test_another_version_of_the_format_is_refused(packed: Path, tmp_path: Path) -> None:
    tensors = load(packed)
    tensors["model.layers.0.mlp.up_proj.weight.emp_meta"][0] = 3
    save_file(tensors, packed / "model.safetensors")
    with pytest.raises(FormatError, match="version 3"):
        unpack(packed, tmp_path / "dense")


def test_packed_tensors_are_unpacked_though_config_json_no_longer_says_that_they_are(
    packed: Path, tmp_path: Path
) -> None:
    # transformers advises to delete it, where emp_llm was not imported
    unpack(packed, tmp_path / "before")
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]
    (packed / "config.json").write_text(json.dumps(config))
    unpack(packed, tmp_path / "dense")
    assert files(tmp_path / "dense") == files(tmp_path / "before")


@pytest.mark.parametrize("method", [None, "gptq"])
def test_a_folder_that_is_not_packed_is_refused(
    packed: Path, tmp_path: Path, method: str | None
) -> None:
    if method is None:
        packed = tmp_path / "source"
    else:
        config = json.loads((packed / "config.json").read_text())
        config["quantization_config"] = {"quant_method": method}
        (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="is not packed by emp-llm"):
        unpack(packed, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
