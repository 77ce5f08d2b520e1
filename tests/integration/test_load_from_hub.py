"""Models of the Hub, loaded pruned or unpacked, and pushed, with the real client."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import differing, files, load
from support.hub_server import HubServer
from support.hub_uploads import UploadHub
from support.loading import Traces, load_model, logits, state
from transformers import AutoModel, AutoModelForCausalLM

from emp_llm import EmpConfig, FormatError, densify, unpack

TinyModel = Callable[..., Path]

# how the Hub's client hands files to httpx and httpx2
pytestmark = pytest.mark.filterwarnings(
    "ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"
)


@pytest.fixture(autouse=True)
def new_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers keeps a client for the Hub that it met first; here each test has its own."""
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)


def assert_same(found: Any, expected: Any) -> None:
    assert differing(state(found), state(expected)) == []
    assert torch.equal(logits(found), logits(expected))


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_a_packed_repository_is_loaded_by_its_id(
    hub: HubServer, pruned_model: TinyModel, architecture: str, sharded: bool
) -> None:
    hub.commit("me/packed", files(pruned_model(architecture, sharded=sharded)))
    dense = pruned_model(architecture, sharded=sharded, output_format="dense")
    assert_same(AutoModelForCausalLM.from_pretrained("me/packed"), load_model(architecture, dense))


@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_a_repository_is_pruned_while_it_is_loaded(
    hub: HubServer,
    tiny_model: TinyModel,
    pruned_model: TinyModel,
    architecture: str,
    sharded: bool,
) -> None:
    hub.commit("me/dense", files(tiny_model(architecture, sharded=sharded)))
    found = AutoModelForCausalLM.from_pretrained("me/dense", quantization_config=EmpConfig())
    dense = pruned_model(architecture, sharded=sharded, output_format="dense")
    assert_same(found, load_model(architecture, dense))


def test_a_revision_is_loaded(hub: HubServer, pruned_model: TinyModel) -> None:
    commit = hub.commit("me/packed", files(pruned_model("llama")), branch="v1")
    hub.commit("me/packed", files(pruned_model("mixtral")))
    dense = load_model("llama", pruned_model("llama", output_format="dense"))
    for revision in ("v1", commit):
        assert_same(AutoModelForCausalLM.from_pretrained("me/packed", revision=revision), dense)
    assert AutoModel.from_pretrained("me/packed").config.model_type == "mixtral"


def test_a_cached_repository_is_loaded_offline(
    hub: HubServer, pruned_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("me/packed", files(pruned_model("llama", sharded=True)))
    first = AutoModelForCausalLM.from_pretrained("me/packed")
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_same(AutoModelForCausalLM.from_pretrained("me/packed"), first)
    assert hub.requests == []


def test_a_private_repository_is_loaded_with_a_token(
    hub: HubServer, pruned_model: TinyModel
) -> None:
    hub.commit("me/packed", files(pruned_model("llama")), private=True)
    hub.readers.add("hf_reader")
    found = AutoModelForCausalLM.from_pretrained("me/packed", token="hf_reader")
    assert_same(found, load_model("llama", pruned_model("llama", output_format="dense")))


def test_each_file_is_fetched_once(hub: HubServer, pruned_model: TinyModel) -> None:
    folder = pruned_model("llama", sharded=True)
    hub.commit("me/packed", files(folder))
    AutoModelForCausalLM.from_pretrained("me/packed")
    weights = [name for name in hub.downloads() if name.endswith(".safetensors")]
    assert weights == sorted(path.name for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("given", [{}, {"quantization_config": EmpConfig()}], ids=["plain", "emp"])
@pytest.mark.parametrize(
    ("asked", "reasons"),
    [
        ({"repo": "me/none"}, ["me/none is not a local folder", "hf auth login"]),
        ({"repo": "me/packed", "revision": "v9"}, ["v9 is not a valid git identifier"]),
    ],
    ids=["repository", "revision"],
)
def test_what_does_not_exist_is_named_with_what_to_do(
    hub: HubServer,
    pruned_model: TinyModel,
    asked: dict[str, str],
    reasons: list[str],
    given: dict[str, Any],
) -> None:
    hub.commit("me/packed", files(pruned_model("llama")))
    traces = Traces()
    repo, revision = asked["repo"], asked.get("revision", "main")
    with pytest.raises(OSError, match=repo) as caught:
        AutoModelForCausalLM.from_pretrained(repo, revision=revision, **given)
    for reason in reasons:
        assert reason in str(caught.value)
    assert traces.left() == set()


def test_a_damaged_shard_of_a_repository_is_named(hub: HubServer, pruned_model: TinyModel) -> None:
    content = files(pruned_model("llama"))
    weights = bytearray(content["model.safetensors"])
    header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    start = 8 + int.from_bytes(weights[:8], "little")
    weights[start + header["model.layers.1.mlp.up_proj.weight"]["data_offsets"][0]] ^= 1
    hub.commit("me/packed", content | {"model.safetensors": bytes(weights)})
    with pytest.raises(FormatError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' is damaged"):
        AutoModelForCausalLM.from_pretrained("me/packed")


# Pushing


@pytest.mark.parametrize("way", ["pruned", "unpacked", "kept"])
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_a_model_is_pushed_packed_as_the_command_writes_it(
    upload_hub: UploadHub,
    tiny_model: TinyModel,
    pruned_model: TinyModel,
    tmp_path: Path,
    architecture: str,
    way: str,
) -> None:
    packed = pruned_model(architecture)
    if way == "pruned":
        source = tiny_model(architecture)
        model = load_model(architecture, source, quantization_config=EmpConfig())
    else:
        keep = {"quantization_config": EmpConfig(keep_packed=True)} if way == "kept" else {}
        model = load_model(architecture, packed, **keep)
    model.push_to_hub("me/pushed")
    for name, content in upload_hub.files("me/pushed").items():
        (tmp_path / name).write_bytes(content)
    assert differing(load(tmp_path), load(packed)) == []
    pushed, written = (
        json.loads((folder / "config.json").read_text()) for folder in (tmp_path, packed)
    )
    assert pushed["quantization_config"] == written["quantization_config"]
    pulled = AutoModelForCausalLM.from_pretrained("me/pushed")
    assert_same(pulled, densify(model) if way == "kept" else model)
    unpack("me/pushed", tmp_path / "dense")
    dense = pruned_model(architecture, output_format="dense")
    assert differing(load(tmp_path / "dense"), load(dense)) == []


def test_a_model_is_pushed_in_shards_by_save_pretrained(
    upload_hub: UploadHub, pruned_model: TinyModel, tmp_path: Path
) -> None:
    model = load_model("mixtral", pruned_model("mixtral"))
    model.save_pretrained(
        tmp_path / "saved", push_to_hub=True, repo_id="me/pushed", max_shard_size="4KB"
    )
    shards = [name for name in upload_hub.files("me/pushed") if name.endswith(".safetensors")]
    assert len(shards) > 3
    assert_same(AutoModelForCausalLM.from_pretrained("me/pushed"), model)


def test_a_dense_twin_is_pushed_plainly(
    upload_hub: UploadHub, pruned_model: TinyModel, tmp_path: Path
) -> None:
    densify(load_model("llama", pruned_model("llama"))).push_to_hub("me/dense")
    for name, content in upload_hub.files("me/dense").items():
        (tmp_path / name).write_bytes(content)
    assert differing(load(tmp_path), load(pruned_model("llama", output_format="dense"))) == []
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
