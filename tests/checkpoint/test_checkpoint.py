"""A local folder is the checkpoint that transformers would load, or one clear error."""

import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from emp_llm.checkpoint.checkpoint import Checkpoint, open_checkpoint
from emp_llm.errors import CheckpointError

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def zeros(*names: str) -> dict[str, np.ndarray]:
    return {name: np.zeros((2, 3), np.float32) for name in names}


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


@pytest.fixture
def single(tmp_path: Path) -> Path:
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    save_file(zeros("a", "b"), tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    save_file(zeros("a"), tmp_path / FIRST)
    save_file(zeros("b", "c"), tmp_path / SECOND)
    write_index(tmp_path, {"c": SECOND, "b": SECOND, "a": FIRST})
    return tmp_path


def write_index(folder: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 72}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


def names(checkpoint: Checkpoint) -> list[str]:
    return [shard.name for shard in checkpoint.shards]


def test_a_single_file_is_a_checkpoint(single: Path) -> None:
    checkpoint = open_checkpoint(single)
    assert names(checkpoint) == ["model.safetensors"]
    assert checkpoint.index_name is None
    assert checkpoint.index_metadata == {}
    assert checkpoint.config == {"model_type": "llama"}
    assert list(checkpoint.tensors) == ["a", "b"]
    assert checkpoint.nbytes == 2 * 2 * 3 * 4


def test_shards_are_found_through_the_index_in_the_order_of_their_names(sharded: Path) -> None:
    checkpoint = open_checkpoint(sharded)
    assert names(checkpoint) == [FIRST, SECOND]
    assert checkpoint.index_name == "model.safetensors.index.json"
    assert checkpoint.index_metadata == {"total_size": 72}
    shard, entry = checkpoint.tensors["b"]
    assert (shard.name, shard.path, entry.shape) == (SECOND, sharded / SECOND, (2, 3))
    assert checkpoint.nbytes == 72


def test_what_save_pretrained_writes_is_a_checkpoint(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    checkpoint = open_checkpoint(tmp_path)
    assert len(checkpoint.shards) > 1
    assert checkpoint.tensors.keys() == model.state_dict().keys()
    assert checkpoint.other_files == (Path("generation_config.json"),)


def test_a_single_file_goes_before_an_index_as_in_transformers(sharded: Path) -> None:
    save_file(zeros("a"), sharded / "model.safetensors")
    assert names(open_checkpoint(sharded)) == ["model.safetensors"]


def test_the_only_safetensors_of_a_folder_may_have_any_name(single: Path) -> None:
    (single / "model.safetensors").rename(single / "weights.safetensors")
    assert names(open_checkpoint(single)) == ["weights.safetensors"]


def test_the_config_can_name_the_weights_as_in_transformers(sharded: Path) -> None:
    save_file(zeros("a"), sharded / "model.safetensors")
    write_json(sharded / "config.json", {"transformers_weights": SECOND})
    assert names(open_checkpoint(sharded)) == [SECOND]


def test_a_tensor_that_the_index_leaves_out_is_part_of_its_shard(sharded: Path) -> None:
    # transformers takes every tensor of the files that the index names
    write_index(sharded, {"a": FIRST, "c": SECOND})
    assert list(open_checkpoint(sharded).tensors) == ["a", "b", "c"]


def test_a_file_that_the_index_leaves_out_is_no_part(sharded: Path) -> None:
    write_index(sharded, {"a": FIRST})
    assert names(open_checkpoint(sharded)) == [FIRST]


def test_an_index_may_do_without_metadata(sharded: Path) -> None:
    index = {"weight_map": {"a": FIRST}}
    write_json(sharded / "model.safetensors.index.json", index)
    assert open_checkpoint(sharded).index_metadata == {}


def test_a_snapshot_of_the_hubs_cache_is_followed_through_its_links(single: Path) -> None:
    repository = single / "hub" / "models--me--m"
    snapshot = repository / "snapshots" / "0123"
    (snapshot / "1_Pooling").mkdir(parents=True)
    (repository / "blobs").mkdir()
    shared = single / "hub" / "blobs" / "ab"  # huggingface_hub 2.4 keeps Xet files here
    shared.mkdir(parents=True)
    shutil.move(single / "model.safetensors", shared / "abcd")
    shutil.move(single / "config.json", repository / "blobs" / "1")
    (repository / "blobs" / "2").write_text("{}")
    (repository / "blobs" / "3").symlink_to("../../blobs/ab/abcd")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    (snapshot / "model.safetensors").symlink_to("../../blobs/3")
    (snapshot / "tokenizer.json").symlink_to("../../blobs/3")
    (snapshot / "1_Pooling" / "config.json").symlink_to("../../../blobs/2")
    checkpoint = open_checkpoint(snapshot)
    assert list(checkpoint.tensors) == ["a", "b"]
    assert checkpoint.other_files == (Path("1_Pooling/config.json"), Path("tokenizer.json"))


def test_a_missing_folder_is_said_to_be_missing(tmp_path: Path) -> None:
    assert "none: there is no such folder" in refusal(tmp_path / "none")


def test_a_file_is_no_folder(single: Path) -> None:
    assert "give the folder of the checkpoint" in refusal(single / "model.safetensors")


def test_a_folder_that_may_not_be_read_is_one_error(single: Path, monkeypatch) -> None:
    def deny(_: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", deny)
    assert refusal(single) == f"{single}: cannot be read: Permission denied"


def test_a_folder_without_config_is_refused(single: Path) -> None:
    (single / "config.json").unlink()
    assert "has no config.json" in refusal(single)


def test_an_adapter_is_named_as_such(single: Path) -> None:
    (single / "config.json").rename(single / "adapter_config.json")
    assert "merge it into its base model" in refusal(single)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "config.json: is not JSON"),
        (b"\xff", "config.json: is not UTF-8 text"),
        (b"[]", "config.json: holds a JSON list, not an object"),
        (b"[" * 100_000, "config.json: nests lists or objects too deep"),
    ],
)
def test_a_config_that_is_no_json_object_is_refused(
    single: Path, content: bytes, reason: str
) -> None:
    (single / "config.json").write_bytes(content)
    assert reason in refusal(single)


def test_a_folder_without_weights_is_refused(single: Path) -> None:
    (single / "model.safetensors").unlink()
    assert "neither model.safetensors nor model.safetensors.index.json" in refusal(single)


@pytest.mark.parametrize("name", ["weights.pt", "consolidated.00.pth"])
def test_other_pickled_weights_are_to_be_converted_first(single: Path, name: str) -> None:
    (single / "model.safetensors").rename(single / name)
    message = refusal(single)
    assert message.startswith(f"{single}: holds only {name}, which is no file that transformers")
    assert "save_pretrained" in message


def test_several_safetensors_without_an_index_are_refused(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    assert refusal(sharded) == (
        f"{sharded}: has 2 files of weights ({FIRST}, …) and no model.safetensors.index.json to "
        "say which ones make up the model: add the index"
    )


def test_a_damaged_shard_is_named(sharded: Path) -> None:
    os.truncate(sharded / SECOND, 100)
    assert refusal(sharded).startswith(f"{SECOND}: is 100 bytes")


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_without_a_weight_map_is_refused(sharded: Path, index: object) -> None:
    write_json(sharded / "model.safetensors.index.json", index)
    assert "model.safetensors.index.json: h" in refusal(sharded)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "a\\b.safetensors",
        "x.safetensors\0.safetensors",
        "..",
        "x.bin",
        "",
        1,
        None,
    ],
)
def test_an_index_must_name_safetensors_beside_it(sharded: Path, name: object) -> None:
    write_index(sharded, {"a": FIRST, "b": name})
    assert "'b' names the file" in refusal(sharded)


def test_the_config_must_name_safetensors_beside_it(single: Path) -> None:
    write_json(single / "config.json", {"transformers_weights": "../x.safetensors"})
    assert "transformers_weights names the file '../x.safetensors'" in refusal(single)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    (sharded / FIRST).unlink()
    assert f"names {FIRST}, which is not there (1 of 2 files missing)" in refusal(sharded)


def test_a_listed_tensor_that_no_shard_has_is_noted(sharded: Path) -> None:
    write_index(sharded, {"a": FIRST, "b": SECOND, "d": SECOND})
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.absent == {"d": SECOND}
    assert list(checkpoint.tensors) == ["a", "b", "c"]


def test_an_index_of_another_checkpoint_is_refused(sharded: Path) -> None:
    write_index(sharded, {"a": FIRST, **dict.fromkeys("defg", SECOND)})
    assert f"{SECOND}: lacks tensor 'd', which the index says it holds (4 missing)" in refusal(
        sharded
    )


def test_a_tensor_may_be_in_another_shard_than_the_index_says(sharded: Path) -> None:
    # transformers takes it from where it is
    write_index(sharded, {"a": SECOND, "b": FIRST})
    checkpoint = open_checkpoint(sharded)
    assert checkpoint.absent == {}
    assert checkpoint.tensors["a"][0].name == FIRST


def test_one_name_in_two_shards_is_refused(sharded: Path) -> None:
    save_file(zeros("b", "c", "a"), sharded / SECOND)
    assert f"tensor 'a' is in {FIRST} and again in {SECOND}" in refusal(sharded)


def test_other_copies_of_the_weights_stay_behind_and_all_else_travels(single: Path) -> None:
    travelling = ["tokenizer.json", "LICENSE", "modeling_x.py", "1_Pooling/config.json", "a.model"]
    travelling += ["2_Dense/model.safetensors", "adapter_model.safetensors", "mmproj-f16.gguf"]
    left = ["pytorch_model.bin", "model.gguf", "onnx/model.onnx", "original/params.json"]
    left += ["pytorch_model.bin.index.json", "model.safetensors.index.fp16.json"]
    hidden = [".gitattributes", ".git/config", ".cache/huggingface/x"]
    for name in travelling + left + hidden:
        (single / name).parent.mkdir(exist_ok=True, parents=True)
        (single / name).write_bytes(b"12")
    checkpoint = open_checkpoint(single)
    assert list(checkpoint.other_files) == sorted(Path(name) for name in travelling)
    found = {
        entry["path"]: (entry["files"], entry["bytes"]) for entry in checkpoint.beside.left_behind
    }
    expected = [name.replace("params.json", "") for name in left]
    assert found == dict.fromkeys(expected, (1, 2))


def test_a_link_to_a_file_elsewhere_is_not_carried_along(single: Path) -> None:
    folder = single / "model"
    folder.mkdir()
    (single / "config.json").rename(folder / "config.json")
    (single / "model.safetensors").rename(folder / "model.safetensors")
    (single / "secret").touch()
    (folder / "tokenizer.json").symlink_to("../secret")
    assert f"tokenizer.json: is a link to {single / 'secret'}" in refusal(folder)


def test_a_link_that_leads_nowhere_is_refused(single: Path) -> None:
    (single / "tokenizer.json").symlink_to("none")
    assert "tokenizer.json: is a link to" in refusal(single)


def test_links_within_the_folder_are_followed(single: Path) -> None:
    (single / "tokenizer.json").touch()
    (single / "alias.json").symlink_to("tokenizer.json")
    assert open_checkpoint(single).other_files == (Path("alias.json"), Path("tokenizer.json"))


def test_linked_folders_are_left_aside_and_reported(single: Path, tmp_path_factory) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "file").touch()
    (single / "sub" / ".hidden").mkdir(parents=True)
    for name in ("link", ".link", "sub/draft", "sub/.hidden/link"):
        (single / name).symlink_to(elsewhere)
    checkpoint = open_checkpoint(single)
    assert checkpoint.other_files == ()
    found = [(entry["path"], entry["reason"]) for entry in checkpoint.beside.left_behind]
    assert found == [("link/", "links to folders"), ("sub/draft/", "links to folders")]


def test_folders_that_cannot_be_read_are_reported(single: Path, monkeypatch) -> None:
    (single / "2_Dense").mkdir()
    (single / "readable").mkdir()
    # root, who may run the tests, can read all
    monkeypatch.setattr("os.access", lambda path, _: path.name != "2_Dense")
    [entry] = open_checkpoint(single).beside.left_behind
    assert (entry["path"], entry["reason"]) == ("2_Dense/", "folders that cannot be read")


def test_pipes_are_left_aside(single: Path) -> None:
    os.mkfifo(single / "pipe")
    assert open_checkpoint(single).other_files == ()
