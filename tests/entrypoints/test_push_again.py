"""An upload that broke off goes on where it did; one that is done sends nothing more."""

from pathlib import Path

import pytest
from support.checkpoints import files
from support.hub_server import sha256
from support.hub_uploads import UploadHub
from support.uploading import LEGACY_UPLOAD, REPO, refusal, without_card

from emp_llm import push

pytestmark = LEGACY_UPLOAD


@pytest.fixture(autouse=True)
def hub(upload_hub: UploadHub) -> UploadHub:
    return upload_hub


def test_a_second_push_sends_nothing(hub: UploadHub, packed_shards: Path) -> None:
    first = push(packed_shards, REPO)
    hub.sent.clear()
    second = push(packed_shards, REPO)
    assert hub.sent == []
    assert second["commit"] == first["commit"]
    assert len(hub.messages) == 1


def test_only_what_changed_is_sent_again(hub: UploadHub, packed_folder: Path) -> None:
    push(packed_folder, REPO)
    hub.sent.clear()
    (packed_folder / "tokenizer.json").write_text('{"a": 1}')
    push(packed_folder, REPO)
    assert hub.sent == []
    assert hub.files(REPO)["tokenizer.json"] == b'{"a": 1}'


def test_an_upload_that_broke_off_goes_on_with_what_is_missing(
    hub: UploadHub, packed_shards: Path
) -> None:
    shards = [path.read_bytes() for path in packed_shards.glob("*.safetensors")]
    sizes = {sha256(data): len(data) for data in shards}
    broken, whole = sorted(sizes)
    hub.cut_uploads[broken] = 100
    message = refusal(packed_shards)
    assert message.startswith(f"me/model: the connection to {hub.url} failed (")
    assert message.endswith(
        f"check the network, then run `emp-llm push '{packed_shards}' me/model`: "
        "what has been sent is kept"
    )
    assert hub.files(REPO) == {}
    assert hub.sent_bytes()[whole] == sizes[whole]
    hub.cut_uploads.clear()
    hub.sent.clear()
    push(packed_shards, REPO)
    assert hub.sent == [(broken, sizes[broken])]
    assert without_card(hub.files(REPO)) == without_card(files(packed_shards))


def test_a_connection_dropped_once_is_no_error(
    hub: UploadHub, packed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.cut_uploads[sha256((packed_folder / "model.safetensors").read_bytes())] = 100
    # as the client says that it tries again, the server is mended
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: hub.cut_uploads.clear())
    push(packed_folder, REPO)
    assert without_card(hub.files(REPO)) == without_card(files(packed_folder))


def test_a_broken_off_upload_to_a_branch_says_how_to_go_on_there(
    hub: UploadHub, packed_folder: Path
) -> None:
    hub.refusals["/commit/"] = 503
    message = refusal(packed_folder, revision="v1")
    assert f"run `emp-llm push {packed_folder} me/model --revision v1`" in message


def test_a_hub_that_is_not_there_is_one_error(hub: UploadHub, packed_folder: Path) -> None:
    hub.__exit__()
    assert "Connection refused" in refusal(packed_folder)
