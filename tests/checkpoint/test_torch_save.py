"""Checkpoints of torch.save are pruned as their safetensors twins are, wherever they lie."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.architectures import ARCHITECTURES
from support.arriving import weights
from support.checkpoints import (
    DOWN,
    F,
    H,
    Tensors,
    differing,
    few_values,
    files,
    llama_config,
    load,
    mlp,
    refusal,
    write_checkpoint,
)
from support.hub_server import HubServer

import emp_llm
from emp_llm import PruneOptions, inspect, prune, verify

FORMATS = pytest.mark.parametrize("output_format", ["packed", "dense"])


def save_torch(
    folder: Path, config: dict[str, object], *shards: Tensors, zipped: bool = True
) -> Path:
    """Write a checkpoint as transformers 4 did before safetensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if len(shards) == 1:
        names = ["pytorch_model.bin"]
    else:
        names = [f"pytorch_model-{i:05}-of-{len(shards):05}.bin" for i in range(1, len(shards) + 1)]
        weight_map = {name: file for file, part in zip(names, shards, strict=True) for name in part}
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for name, tensors in zip(names, shards, strict=True):
        torch.save(tensors, folder / name, _use_new_zipfile_serialization=zipped)
    return folder


def two_shards() -> tuple[Tensors, Tensors]:
    weights = mlp(H, F)
    down = {DOWN: weights.pop(DOWN)}
    return weights, {**down, "model.norm.weight": few_values(H, dtype=torch.float32)}


@pytest.fixture
def twin(tmp_path: Path) -> Path:
    """Two shards of safetensors."""
    folder = write_checkpoint(tmp_path / "twin", llama_config(H, F), *two_shards())
    paths = sorted(folder.glob("*.safetensors"))
    for path, tensors in zip(paths, two_shards(), strict=True):
        save_file(tensors, path, {"format": "pt"})  # as ours have, and torch.save has nothing else
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same of torch.save."""
    return save_torch(tmp_path / "torch", llama_config(H, F), *two_shards())


@FORMATS
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_shards_of_torch_save_become_the_files_that_safetensors_become(
    tmp_path: Path, twin: Path, output_format: str, zipped: bool
) -> None:
    source = save_torch(tmp_path / "torch", llama_config(H, F), *two_shards(), zipped=zipped)
    options = PruneOptions(output_format=output_format)
    prune(twin, tmp_path / "expected", options)
    prune(source, tmp_path / "out", options)
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")
    assert "model-00002-of-00002.safetensors" in files(tmp_path / "out")
    assert verify(tmp_path / "out")["tensors"] == 4


@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_matrices_that_lie_transposed_are_pruned_by_their_rows(
    tmp_path: Path, granularity: str
) -> None:
    dense = mlp(H, F)
    lying = {name: tensor.t().contiguous().t() for name, tensor in dense.items()}
    assert not any(tensor.is_contiguous() for tensor in lying.values())
    expected = write_checkpoint(tmp_path / "dense", llama_config(H, F), dense)
    source = save_torch(tmp_path / "lying", llama_config(H, F), lying)
    options = PruneOptions(output_format="dense", granularity=granularity)
    prune(expected, tmp_path / "expected", options)
    prune(source, tmp_path / "out", options)
    assert differing(load(tmp_path / "out"), load(tmp_path / "expected")) == []


def tiny(name: str, folder: Path) -> tuple[type, Path, Tensors]:
    """A tiny model, saved by torch.save with every name that its state dict has."""
    import transformers

    model_class, config_class, fields = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**fields))
    state = model.to(torch.bfloat16).state_dict()
    config = {**model.config.to_dict(), "architectures": [model_class], "dtype": "bfloat16"}
    return type(model), save_torch(folder, config, state), state


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("llama", set()),
        ("llama-tied", {"lm_head.weight"}),
        ("gpt2", {"lm_head.weight"}),
        (
            "t5",
            {"encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"},
        ),
        ("bert", {"cls.predictions.decoder.weight", "cls.predictions.decoder.bias"}),
    ],
)
def test_what_the_model_ties_is_written_once_and_loads_as_the_same_model(
    tmp_path: Path, name: str, left_out: set[str]
) -> None:
    model_class, source, state = tiny(name, tmp_path / "model")
    report = prune(source, tmp_path / "out", PruneOptions(output_format="dense"))
    written = load(tmp_path / "out")
    assert state.keys() - written.keys() == left_out
    assert report["tensors"].keys() == written.keys()
    assert verify(tmp_path / "out", against=source)["tensors"] == len(written)
    loaded = model_class.from_pretrained(tmp_path / "out").state_dict()
    assert loaded.keys() == state.keys()
    pruned = {part for part, fields in report["tensors"].items() if fields["pruned"]}
    assert differing(loaded, {**state, **{part: written[part] for part in pruned}}) == []


def test_shared_bytes_that_the_model_does_not_tie_are_written_twice(tmp_path: Path) -> None:
    shared = few_values(8, H)
    tensors = {**mlp(H, F), "model.embed_tokens.weight": shared, "lm_head.weight": shared}
    source = save_torch(tmp_path / "model", llama_config(H, F), tensors)
    prune(source, tmp_path / "out")
    written = load(tmp_path / "out")
    assert written["lm_head.weight"].equal(shared)
    assert written["model.embed_tokens.weight"].equal(shared)
    assert verify(tmp_path / "out", against=source)["tensors"] == len(tensors)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_from_pretrained_prunes_torch_checkpoints_too(tmp_path: Path, name: str) -> None:
    model_class, source, _ = tiny(name, tmp_path / "model")
    prune(source, tmp_path / "out", PruneOptions(output_format="dense"))
    expected = model_class.from_pretrained(tmp_path / "out").state_dict()
    config = emp_llm.EmpConfig(beta=1.0)
    loaded = model_class.from_pretrained(source, quantization_config=config)
    assert differing(dict(loaded.state_dict()), dict(expected)) == []


def test_safetensors_come_before_files_of_torch_save(tmp_path: Path, sharded: Path) -> None:
    folder = write_checkpoint(tmp_path / "both", llama_config(H, F), mlp(H, F))
    for path in sharded.glob("pytorch_model*"):
        (folder / path.name).write_bytes(path.read_bytes())
    assert len(inspect(folder)["tensors"]) == 3


def test_one_file_comes_before_an_index_and_both_before_safetensors_of_other_names(
    tmp_path: Path, sharded: Path
) -> None:
    torch.save(mlp(H, F), sharded / "pytorch_model.bin")
    write_checkpoint(tmp_path / "adapter", llama_config(H, F), {"lora": few_values(2, 2)})
    adapter = (tmp_path / "adapter" / "model.safetensors").read_bytes()
    (sharded / "adapter_model.safetensors").write_bytes(adapter)
    assert len(inspect(sharded)["tensors"]) == 3


def test_an_index_of_torch_shards_leads_to_no_other_files(tmp_path: Path, sharded: Path) -> None:
    index = sharded / "pytorch_model.bin.index.json"
    index.write_text(
        index.read_text().replace("-00002-of-00002.bin", "-00002-of-00002.safetensors")
    )
    assert "must be a file name that ends in .bin" in refusal(sharded, tmp_path / "out")


def test_a_checkpoint_that_would_run_code_leaves_nothing_behind(
    tmp_path: Path, sharded: Path
) -> None:
    torch.save({"x": torch.nn.Linear(2, 2)}, sharded / "pytorch_model-00002-of-00002.bin")
    message = refusal(sharded, tmp_path / "out")
    assert message.startswith("pytorch_model-00002-of-00002.bin: its pickle calls torch.nn.")


def test_an_unfinished_run_on_a_torch_checkpoint_goes_on(
    tmp_path: Path, sharded: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(sharded, tmp_path / "expected")

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("emp_llm.entrypoints.prune.write_index", fail)
    with pytest.raises(KeyboardInterrupt):
        prune(sharded, tmp_path / "out")
    monkeypatch.undo()
    prune(sharded, tmp_path / "out")
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")


@pytest.mark.parametrize("knows_ranges", [True, False])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_torch_checkpoint_of_the_hub_is_pruned_as_it_arrives(
    tmp_path: Path, hub: HubServer, zipped: bool, knows_ranges: bool
) -> None:
    tied = few_values(8, H)
    first, second = two_shards()
    first |= {"model.embed_tokens.weight": tied, "lm_head.weight": tied, "x": torch.ones(100_000)}
    config = {**llama_config(H, F), "tie_word_embeddings": True}
    folder = save_torch(tmp_path / "torch", config, first, second, zipped=zipped)
    others = {"model.onnx": b"x", "pytorch_model.bin.old": b"y"}
    hub.commit("me/model", {**files(folder), **others})
    hub.knows_ranges = knows_ranges
    prune(folder, tmp_path / "expected")
    prune("me/model", tmp_path / "out", discard_source=True)
    assert weights(tmp_path / "out").keys() >= {"model-00001-of-00002.safetensors"}
    for name, content in weights(tmp_path / "expected").items():
        assert files(tmp_path / "out")[name] == content
    downloads = [name for name in hub.downloads() if name.endswith(".bin")]
    assert downloads == [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]


def test_torch_files_of_the_hub_are_not_downloaded_beside_safetensors(
    tmp_path: Path, hub: HubServer, twin: Path, sharded: Path
) -> None:
    hub.commit("me/model", {**files(sharded), **files(twin)})
    prune("me/model", tmp_path / "out")
    assert [name for name in hub.downloads() if name.endswith(".bin")] == []
    assert [name for name in hub.looked_into() if name.endswith(".bin")] == []


def test_a_torch_checkpoint_of_the_hub_that_would_run_code_is_refused_before_it_comes(
    tmp_path: Path, hub: HubServer
) -> None:
    torch.save(torch.nn.Linear(300, 300), tmp_path / "a.bin")
    content = (tmp_path / "a.bin").read_bytes()
    hub.commit("me/model", {"config.json": b"{}", "pytorch_model.bin": content})
    with pytest.raises(emp_llm.HubError, match=r"me/model: pytorch_model\.bin: its pickle calls"):
        prune("me/model", tmp_path / "out")
    assert hub.downloads() == ["config.json"]
