"""Addresses on the Hub, as copied from a browser, stand for ids and revisions."""

from pathlib import Path

import pytest
from emp_cli.app import app
from support.checkpoints import files
from support.hub_server import HubServer
from support.uploading import LEGACY_UPLOAD
from typer.testing import CliRunner

from emp_llm import CheckpointError, HubError, OptionError, prune, push
from emp_llm.hub.address import read_address
from emp_llm.hub.source import find_file

PAGE = "https://huggingface.co/me/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("address", "repo_id", "revision"),
    [
        (PAGE, "me/model", None),
        (f"{PAGE}/", "me/model", None),
        (f"{PAGE}.git", "me/model", None),
        (f"{PAGE}?library=transformers#usage", "me/model", None),
        ("http://www.huggingface.co//me/model", "me/model", None),
        ("HTTPS://HuggingFace.co/me/Model", "me/Model", None),
        ("https://hf.co/me/model", "me/model", None),
        ("hf.co/me/model", "me/model", None),
        ("huggingface.co/me/model/tree/main", "me/model", "main"),
        ("https://huggingface.co/gpt2", "gpt2", None),
        ("https://huggingface.co/gpt2/tree/main", "gpt2", "main"),
        ("https://huggingface.co/me/tree/tree/main", "me/tree", "main"),
        ("https://huggingface.co/api/models/me/model", "me/model", None),
        (f"{PAGE}/tree/main/", "me/model", "main"),
        (f"{PAGE}/tree/v1.0?show=all", "me/model", "v1.0"),
        (f"{PAGE}/tree/refs%2Fpr%2F3", "me/model", "refs/pr/3"),
        (f"{PAGE}/tree/refs/pr/3", "me/model", "refs/pr/3"),
        (f"{PAGE}/tree/a%2Fbranch", "me/model", "a/branch"),
        (f"{PAGE}/commit/{COMMIT}", "me/model", COMMIT),
        (f"{PAGE}/commits/main", "me/model", "main"),
        (f"{PAGE}/blob/main/config.json", "me/model", "main"),
        (f"{PAGE}/resolve/v1.0/model.safetensors?download=true", "me/model", "v1.0"),
        ("hf://me/model", "me/model", None),
        ("hf://models/me/model/", "me/model", None),
        ("hf://me/model@v1.0", "me/model", "v1.0"),
        ("hf://me/model@refs/pr/3", "me/model", "refs/pr/3"),
        # no addresses
        ("me/model", "me/model", None),
        ("a/b/c", "a/b/c", None),
        ("", "", None),
    ],
)
def test_an_address_is_an_id_and_a_revision(
    address: str, repo_id: str, revision: str | None
) -> None:
    assert read_address(address) == (repo_id, revision)


@pytest.mark.parametrize(
    ("address", "what"),
    [
        ("https://github.com/me/model", "is not an address on the Hub (https://huggingface.co)"),
        ("https://huggingface.co.evil.org/me/model", "is not an address on the Hub"),
        ("s3://bucket/model", "is not an address on the Hub"),
        ("file:///home/me/model", "is not an address on the Hub"),
        ("https://[huggingface.co/me/model", "is not an address"),
        ("https://huggingface.co/", "is not the address of a model"),
        ("https://huggingface.co/datasets/me/data", "is not the address of a model"),
        ("https://huggingface.co/spaces/me/space", "is not the address of a model"),
        ("hf://datasets/me/data", "is not the address of a model"),
        (f"{PAGE}/discussions/3", "is not the address of a model; give me/model"),
        (f"{PAGE}/settings", "is not the address of a model; give me/model"),
        (f"{PAGE}/tree/main/fp16", "lies in a folder of me/model"),
        (f"{PAGE}/blob/main/fp16/config.json", "lies in a folder of me/model"),
        ("hf://me/model/fp16", "lies in a folder of me/model"),
        ("hf://me/model@v1.0/fp16", "lies in a folder of me/model"),
    ],
)
def test_an_address_of_something_else_is_one_line(address: str, what: str) -> None:
    with pytest.raises(HubError) as caught:
        read_address(address)

    assert str(caught.value).startswith(f"{address}: {what}")


def test_a_revision_besides_must_be_the_same() -> None:
    assert read_address(f"{PAGE}/tree/v1.0", "v1.0") == ("me/model", "v1.0")
    assert read_address(PAGE, "v1.0") == ("me/model", "v1.0")
    with pytest.raises(OptionError, match=r"revision is 'v2', but .* is at the revision 'v1.0'"):
        read_address(f"{PAGE}/tree/v1.0", "v2")


@pytest.mark.parametrize("endpoint", ["https://hub.lab:8443", "https://mirror.lab/hf"])
def test_the_host_of_the_endpoint_is_the_hub(
    monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)

    assert read_address(f"{endpoint}/me/model/tree/v1.0") == ("me/model", "v1.0")
    assert read_address(PAGE) == ("me/model", None)
    with pytest.raises(HubError, match="is not an address on the Hub"):
        read_address("https://hub.lab:1/me/model")


def test_a_model_is_pruned_by_its_address(hub: HubServer, model: str, tmp_path: Path) -> None:
    address = f"{hub.url}/{model}"
    report = prune(f"{address}/tree/main", tmp_path / "address")
    prune(model, tmp_path / "id")

    assert report["source"]["model"] == "me/model"
    assert files(tmp_path / "address") == files(tmp_path / "id")
    assert find_file(f"{address}/blob/main/config.json", "config.json") is not None
    with pytest.raises(CheckpointError, match="has no revision 'v9'"):
        prune(f"{address}/tree/v9", tmp_path / "none")


def test_the_model_that_is_pruned_is_not_pushed_to_under_its_address() -> None:
    arguments = ["prune", "me/model", "--out", "out", "--push-to-hub", f"{PAGE}/tree/main"]

    result = CliRunner().invoke(app, arguments)

    assert result.exit_code == 2
    assert "is the model that is pruned" in result.output


def test_a_folder_comes_before_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hf.co" / "me" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)

    assert find_file("hf.co/me/model", "config.json") == Path("hf.co/me/model/config.json")


@LEGACY_UPLOAD
def test_a_folder_is_pushed_to_an_address(upload_hub: HubServer, packed_folder: Path) -> None:
    pushed = push(packed_folder, f"{upload_hub.url}/me/new/tree/small")

    assert (pushed["repo_id"], pushed["revision"]) == ("me/new", "small")
