"""An upload that cannot be: one line that says what to do, and nothing half done."""

import shutil
from pathlib import Path

import pytest
from support.hub_uploads import UploadHub, User
from support.uploading import LEGACY_UPLOAD, REPO, refusal

from emp_llm import CheckpointError, FormatError, push

pytestmark = LEGACY_UPLOAD


@pytest.fixture(autouse=True)
def hub(upload_hub: UploadHub) -> UploadHub:
    return upload_hub


# tokens and rights


def test_without_a_token_nothing_is_asked(
    hub: UploadHub, packed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    message = refusal(packed_folder)
    assert message.startswith(f"me/model: there is no token to write to {hub.url} with: run `hf")
    assert "there is no token" in refusal(packed_folder, token=True)
    assert hub.requests == []


def test_no_token_can_be_wanted(packed_folder: Path) -> None:
    assert "there is no token" in refusal(packed_folder, token=False)


def test_a_given_token_is_used(hub: UploadHub, packed_folder: Path) -> None:
    hub.users["hf_other"] = User("other")
    push(packed_folder, "other/model", token="hf_other")
    assert "other/model" in hub.models


def test_a_token_that_is_not_known_is_one_error(packed_folder: Path) -> None:
    message = refusal(packed_folder, token="hf_wrong")
    assert "the Hub does not accept the token: run `hf auth login` or set HF_TOKEN" in message


def test_a_token_that_may_only_read_is_one_error(hub: UploadHub, packed_folder: Path) -> None:
    hub.users["hf_reader"] = User("me", role="read")
    hub.readers.add("hf_reader")
    for exists in (False, True):
        if exists:
            hub.commit(REPO, {})
        message = refusal(packed_folder, token="hf_reader")
        assert message.startswith("me/model: the token may not write to it")
        assert f"{hub.url}/settings/tokens" in message


def test_a_repository_of_others_is_refused(hub: UploadHub, packed_folder: Path) -> None:
    hub.commit("they/model", {"notes.txt": b"theirs"})
    message = refusal(packed_folder, repo="they/model")
    assert "they/model: the token may not write to it (You have read access but not" in message
    assert "--create-pr" in message
    assert hub.sent == []


def test_a_namespace_of_others_is_refused(hub: UploadHub, packed_folder: Path) -> None:
    assert "the token may not write to it" in refusal(packed_folder, repo="they/new")
    assert "they/new" not in hub.models


@pytest.mark.parametrize("repo", ["a b", "me/model/x", "", "-x", "me/.."])
def test_an_impossible_name_is_refused_before_anything_is_asked(
    hub: UploadHub, packed_folder: Path, repo: str
) -> None:
    message = refusal(packed_folder, repo=repo)
    assert message.startswith(f"{repo!r} cannot be the name of a repository")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (413, "the Hub refuses the upload with status 413 (refused as told)"),
        (429, "fewer requests (429): wait some minutes, then run `emp-llm push"),
        (503, "answered with status 503"),
    ],
)
def test_a_refusal_of_the_hub_says_what_to_do(
    hub: UploadHub, packed_folder: Path, status: int, reason: str
) -> None:
    hub.refusals["/preupload/"] = status
    assert reason in refusal(packed_folder)


def test_offline_mode_is_named(packed_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids to upload: unset it" in refusal(packed_folder)


def test_metadata_that_the_hub_refuses_is_told(packed_folder: Path) -> None:
    card = packed_folder / "README.md"
    card.write_text(card.read_text().replace("language: 'no'", "language: false"))
    message = refusal(packed_folder)
    assert 'the Hub refuses the metadata of README.md ("language" must be a string)' in message


# folders that must not go up


def damage_weights(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-200] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def cut_report(folder: Path) -> None:
    (folder / "emp_report.json").write_bytes(b"{}")


def break_figures(folder: Path) -> None:
    (folder / "emp_eval.json").write_text('{"results": 1}')


DAMAGES = {
    "weights that changed": (damage_weights, FormatError, "model.safetensors"),
    "a report that is none": (cut_report, FormatError, "is not a report"),
    "figures that are none": (break_figures, FormatError, "results is 1, it must be a list"),
    "no config": (lambda f: (f / "config.json").unlink(), CheckpointError, "has no config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), CheckpointError, "has neither"),
    "no folder": (shutil.rmtree, CheckpointError, "there is no such folder"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder_is_refused_before_anything_is_asked(
    hub: UploadHub, packed_folder: Path, case: str
) -> None:
    damage, kind, reason = DAMAGES[case]
    damage(packed_folder)
    assert reason in refusal(packed_folder, kind)
    assert hub.requests == []


def test_a_shard_that_is_missing_is_refused(hub: UploadHub, sharded: Path) -> None:
    next(sharded.glob("model-00002*")).unlink()
    assert "1 of 2 files missing" in refusal(sharded, CheckpointError)
    assert hub.requests == []
