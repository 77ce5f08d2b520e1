"""An index that lists what no shard has is no harm where the model does without it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import files, load
from support.hub_server import HubServer
from support.loading import load_model

from emp_llm import (
    CheckpointError,
    EmpConfig,
    PruneOptions,
    diff,
    inspect,
    prune,
    unpack,
    verify,
)

TinyModel = Callable[..., Path]

INDEX = "model.safetensors.index.json"
TIED, UNUSED = "lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"


def list_too(folder: Path, *names: str) -> Path:
    """Have the index list further tensors, in the file that has the embedding, and lie on sizes."""
    index = json.loads((folder / INDEX).read_text())
    file = index["weight_map"]["model.embed_tokens.weight"]
    index["weight_map"] |= dict.fromkeys(names, file)
    index["metadata"]["total_size"] = 1
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.fixture
def stale(tiny_model: TinyModel, tmp_path: Path) -> Path:
    source = tiny_model("llama-tied", sharded=True)
    return list_too(Path(shutil.copytree(source, tmp_path / "stale")), TIED, UNUSED)


@pytest.mark.parametrize("output_format", ["packed", "dense"])
def test_it_is_pruned_and_the_new_index_is_right(
    stale: Path, tmp_path: Path, output_format: str
) -> None:
    out = tmp_path / "out"
    report = prune(stale, out, PruneOptions(output_format=output_format))
    assert "missing" not in report
    index = json.loads((out / INDEX).read_text())
    written = load(out)
    assert index["weight_map"].keys() == written.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in written.values())
    verify(out)
    assert verify(out, against=stale)["tensors"] == len(report["tensors"])
    assert diff(stale, out)["only_in_a"] == []


def test_it_is_inspected_and_loaded_as_it_is_pruned(stale: Path, tmp_path: Path) -> None:
    report = prune(stale, tmp_path / "out")
    assert inspect(stale, curve=False)["totals"]["model"] == report["totals"]["model"]
    load_model("llama-tied", stale, quantization_config=EmpConfig()).save_pretrained(
        tmp_path / "saved"
    )
    assert diff(tmp_path / "saved", tmp_path / "out")["same_weights"]


def test_it_is_pruned_from_the_hub(hub: HubServer, stale: Path, tmp_path: Path) -> None:
    hub.commit("me/model", files(stale))
    report = prune("me/model", tmp_path / "out")
    assert report["tensors"] == prune(stale, tmp_path / "local")["tensors"]


def test_what_the_hubs_model_needs_is_named_with_the_model(
    hub: HubServer, tiny_model: TinyModel, tmp_path: Path
) -> None:
    source = Path(shutil.copytree(tiny_model("llama", sharded=True), tmp_path / "source"))
    list_too(source, "model.embed_tokens.weight")
    shard = json.loads((source / INDEX).read_text())["weight_map"]["model.embed_tokens.weight"]
    weights = load_file(source / shard)
    del weights["model.embed_tokens.weight"]
    save_file({**weights, "unused": torch.ones(1)}, source / shard)
    hub.commit("me/model", files(source))
    with pytest.raises(CheckpointError) as caught:
        prune("me/model", tmp_path / "out")
    assert str(caught.value).startswith(
        f"me/model: {shard} lacks tensor 'model.embed_tokens.weight', which the index lists and "
        "LlamaForCausalLM needs (1 missing)"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [verify, lambda folder: unpack(folder, f"{folder}-unpacked")])
def test_in_a_folder_that_emp_llm_wrote_it_is_damage(
    tiny_model: TinyModel, tmp_path: Path, command: Callable[[Path], object]
) -> None:
    prune(tiny_model("llama-tied", sharded=True), tmp_path / "out")
    list_too(tmp_path / "out", TIED)
    with pytest.raises(CheckpointError, match=rf"lacks tensor '{TIED}', which the index says"):
        command(tmp_path / "out")
    assert not (tmp_path / "out-unpacked").exists()
