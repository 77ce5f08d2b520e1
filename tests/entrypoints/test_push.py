"""Folders are uploaded with the real client, to a server on the loopback interface."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from support.checkpoints import differing, files
from support.hub_uploads import UploadHub
from support.uploading import LEGACY_UPLOAD, REPO, refusal, without_card

from emp_llm import FormatError, OptionError, PruneOptions, pack, prune, push, unpack, verify
from emp_llm.runtime.progress import Silent

pytestmark = LEGACY_UPLOAD

TinyModel = Callable[..., Path]


@pytest.fixture(autouse=True)
def hub(upload_hub: UploadHub) -> UploadHub:
    return upload_hub


def test_a_packed_folder_is_uploaded_byte_for_byte(hub: UploadHub, packed_folder: Path) -> None:
    before = files(packed_folder)
    done = push(packed_folder, REPO)
    there = hub.files(REPO)
    assert without_card(there) == without_card(before)
    assert there.keys() == before.keys()
    assert files(packed_folder) == before
    sizes = [len(data) for data in there.values()]
    assert (done["files"], done["bytes"]) == (len(sizes), sum(sizes))
    assert done["commit"] == hub.models[REPO].refs["main"]
    assert (done["repo_id"], done["url"]) == (REPO, f"{hub.url}/{REPO}")
    assert (done["revision"], done["branch_made"]) == (None, False)


def test_what_was_uploaded_is_unpacked_by_its_id(packed_folder: Path, tmp_path: Path) -> None:
    push(packed_folder, REPO)
    unpack(REPO, tmp_path / "from the hub")
    unpack(packed_folder, tmp_path / "from here")
    assert without_card(files(tmp_path / "from the hub")) == without_card(
        files(tmp_path / "from here")
    )


def test_what_was_uploaded_is_downloaded_whole(packed_shards: Path) -> None:
    from huggingface_hub import snapshot_download

    push(packed_shards, REPO, revision="v1")
    verify(snapshot_download(REPO, revision="v1"))


def test_the_card_on_the_hub_names_the_model(hub: UploadHub, packed_folder: Path) -> None:
    push(packed_folder, REPO)
    card = hub.files(REPO)["README.md"].decode()
    assert 'from_pretrained("me/model")' in card
    assert "emp-llm unpack me/model --out DENSE" in card
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "mit"
    assert yaml.safe_load(front)["language"] == "no"
    assert text.count("<!-- emp-llm -->") == 1


def test_the_lines_to_load_with_are_told(packed_folder: Path) -> None:
    assert push(packed_folder, REPO, revision="v1")["load"] == [
        "# needs emp-llm: pip install emp-llm",
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained("me/model", revision="v1")',
    ]


def test_a_name_alone_is_the_owners(hub: UploadHub, packed_folder: Path) -> None:
    assert push(packed_folder, "model")["repo_id"] == REPO
    assert 'from_pretrained("me/model")' in hub.files(REPO)["README.md"].decode()


def test_an_organization_of_the_user_is_written_to(hub: UploadHub, packed_folder: Path) -> None:
    push(packed_folder, "lab/model")
    assert without_card(hub.files("lab/model")) == without_card(files(packed_folder))


@pytest.mark.parametrize(("private", "expected"), [(None, False), (False, False), (True, True)])
def test_a_new_repository_is_private_if_it_is_asked_for(
    hub: UploadHub, packed_folder: Path, private: bool | None, expected: bool
) -> None:
    push(packed_folder, REPO, private=private)
    assert hub.models[REPO].private is expected


def test_a_public_repository_is_not_written_to_where_it_must_be_private(
    hub: UploadHub, packed_folder: Path
) -> None:
    hub.commit(REPO, {"config.json": b"{}"})
    assert "me/model exists and is public" in refusal(packed_folder, private=True)
    assert hub.files(REPO) == {"config.json": b"{}"}


def test_a_folder_that_save_pretrained_wrote_is_uploaded_as_it_is(
    hub: UploadHub, source: Path
) -> None:
    push(source, REPO)
    assert hub.files(REPO) == files(source)


def test_small_files_that_were_edited_are_uploaded_and_told(
    hub: UploadHub, packed_folder: Path
) -> None:
    (packed_folder / "tokenizer.json").write_text('{"mine": 1}')
    (packed_folder / "LICENSE").unlink()
    assert push(packed_folder, REPO)["edited_files"] == ["LICENSE", "tokenizer.json"]
    assert hub.files(REPO)["tokenizer.json"] == b'{"mine": 1}'


def test_weights_beside_the_models_own_are_uploaded_and_an_older_models_adapter_goes(
    hub: UploadHub, source: Path, packed_folder: Path, tmp_path: Path
) -> None:
    (source / "2_Dense").mkdir()
    for name in ("2_Dense/model.safetensors", "adapter_model.safetensors"):
        (source / name).write_bytes(name.encode())
    prune(source, tmp_path / "with")
    push(tmp_path / "with", REPO)
    assert without_card(hub.files(REPO)) == without_card(files(tmp_path / "with"))
    push(packed_folder, REPO)
    assert "adapter_model.safetensors" not in hub.files(REPO)


@pytest.mark.parametrize("data", [b"others", None])
def test_weights_beside_the_models_own_that_have_changed_are_refused(
    hub: UploadHub, source: Path, tmp_path: Path, data: bytes | None
) -> None:
    (source / "value_head.bin").write_bytes(b"a head")
    prune(source, tmp_path / "out")
    path = tmp_path / "out" / "value_head.bin"
    path.write_bytes(data) if data else path.unlink()
    with pytest.raises(FormatError, match=r"value_head\.bin is (not as it was written|missing)"):
        push(tmp_path / "out", REPO)
    assert hub.models == {}


def test_a_packed_folder_without_a_report_is_proved_in_structure(
    hub: UploadHub, packed_folder: Path
) -> None:
    (packed_folder / "emp_report.json").unlink()
    assert push(packed_folder, REPO)["edited_files"] == []
    path = packed_folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][0] ^= 1
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(FormatError, match="row 0"):
        push(packed_folder, "me/other")
    assert "me/other" not in hub.models


def test_a_dense_folder_is_uploaded_with_its_card(
    hub: UploadHub, source: Path, tmp_path: Path
) -> None:
    dense = tmp_path / "dense"
    prune(source, dense, PruneOptions(output_format="dense"))
    assert push(dense, REPO)["load"][0] == "from transformers import AutoModelForCausalLM"
    assert without_card(hub.files(REPO)) == without_card(files(dense))
    assert b'from_pretrained("me/model")' in hub.files(REPO)["README.md"]


def test_hidden_files_stay_behind(hub: UploadHub, packed_folder: Path) -> None:
    expected = without_card(files(packed_folder))
    for hidden in (".cache/huggingface/x", ".emp-llm-unfinished/y", ".env", "sub/.secret"):
        (packed_folder / hidden).parent.mkdir(parents=True, exist_ok=True)
        (packed_folder / hidden).write_text("hidden")
    (packed_folder / "sub" / "seen.txt").write_text("seen")
    push(packed_folder, REPO)
    assert without_card(hub.files(REPO)) == expected | {"sub/seen.txt": b"seen"}


def test_a_snapshot_of_the_cache_is_uploaded_and_stays_as_it_is(
    hub: UploadHub, packed_folder: Path
) -> None:
    from huggingface_hub import snapshot_download

    push(packed_folder, REPO)
    snapshot = Path(snapshot_download(REPO))
    before = files(snapshot)
    push(snapshot, "me/copy")
    assert files(snapshot) == before
    assert without_card(hub.files("me/copy")) == without_card(hub.files(REPO))


# what an older model leaves


def test_weights_of_an_older_model_go_and_other_files_stay(
    hub: UploadHub, packed_folder: Path, packed_shards: Path
) -> None:
    push(packed_shards, REPO)
    hub.commit(REPO, {**hub.files(REPO), "emp_eval.json": b"{}", "notes.txt": b"mine"})
    push(packed_folder, REPO)
    assert without_card(hub.files(REPO)) == without_card(files(packed_folder)) | {
        "notes.txt": b"mine"
    }


def test_the_first_file_of_weights_goes_where_shards_take_its_place(
    hub: UploadHub, packed_folder: Path, packed_shards: Path
) -> None:
    push(packed_folder, REPO)
    push(packed_shards, REPO)
    assert "model.safetensors" not in hub.files(REPO)
    assert files(packed_shards).keys() <= hub.files(REPO).keys()


def test_the_report_of_an_older_model_goes(
    hub: UploadHub, packed_folder: Path, source: Path
) -> None:
    push(packed_folder, REPO)
    push(source, REPO)
    assert hub.files(REPO).keys().isdisjoint({"emp_report.json", "emp_report.svg"})


# branches and pull requests


def test_a_branch_that_is_not_there_is_made(hub: UploadHub, packed_folder: Path) -> None:
    hub.commit(REPO, {"notes.txt": b"mine"})
    done = push(packed_folder, REPO, revision="beta/1")
    assert (done["revision"], done["branch_made"]) == ("beta/1", True)
    assert done["url"] == f"{hub.url}/{REPO}/tree/beta/1"
    assert hub.files(REPO) == {"notes.txt": b"mine"}
    assert hub.files(REPO, "beta/1").keys() == files(packed_folder).keys() | {"notes.txt"}


def test_a_branch_that_is_there_is_written_to(hub: UploadHub, packed_folder: Path) -> None:
    hub.commit(REPO, {"main.txt": b"main"})
    hub.commit(REPO, {"branch.txt": b"branch"}, branch="v1")
    assert push(packed_folder, REPO, revision="v1")["branch_made"] is False
    assert hub.files(REPO, "v1").keys() == files(packed_folder).keys() | {"branch.txt"}


def test_main_is_a_branch_like_none(hub: UploadHub, packed_folder: Path) -> None:
    assert push(packed_folder, REPO, revision="main")["revision"] is None
    assert hub.files(REPO).keys() == files(packed_folder).keys()


def test_an_open_pull_request_is_added_to(hub: UploadHub, packed_folder: Path) -> None:
    hub.commit(REPO, {})
    hub.commit(REPO, {}, branch="refs/pr/1")
    assert push(packed_folder, REPO, revision="refs/pr/1")["branch_made"] is False
    assert hub.files(REPO, "refs/pr/1").keys() == files(packed_folder).keys()


@pytest.mark.parametrize("revision", ["tag-1", "0123456789abcdef0123456789abcdef01234567"])
def test_only_branches_can_be_written_to(
    hub: UploadHub, packed_folder: Path, revision: str
) -> None:
    hub.commit(REPO, {})
    hub.commit(REPO, {}, branch="tag-1")
    kind = "tag" if revision == "tag-1" else "commit"
    message = refusal(packed_folder, revision=revision)
    assert message.startswith(f"me/model: {revision!r} is a {kind}, which cannot be written to")


def test_a_pull_request_that_is_not_there_is_named(hub: UploadHub, packed_folder: Path) -> None:
    hub.commit(REPO, {})
    assert "me/model has no such revision" in refusal(packed_folder, revision="refs/pr/9")


def test_a_pull_request_needs_no_right_to_write(hub: UploadHub, packed_folder: Path) -> None:
    hub.commit("they/model", {"notes.txt": b"theirs"})
    done = push(packed_folder, "they/model", create_pr=True)
    assert done["url"] == f"{hub.url}/they/model/discussions/1"
    assert done["revision"] == "refs/pr/1"
    assert done["load"][-1].endswith('from_pretrained("they/model", revision="refs/pr/1")')
    assert hub.files("they/model") == {"notes.txt": b"theirs"}
    assert files(packed_folder).keys() <= hub.files("they/model", "refs/pr/1").keys()


def test_a_pull_request_needs_a_repository(hub: UploadHub, packed_folder: Path) -> None:
    assert refusal(packed_folder, create_pr=True).startswith("me/model does not exist at")
    assert REPO not in hub.models


def test_a_pull_request_to_a_branch_is_refused(hub: UploadHub, packed_folder: Path) -> None:
    message = refusal(packed_folder, OptionError, create_pr=True, revision="v1")
    assert "a pull request goes to the default branch" in message
    assert hub.requests == []


def test_the_message_of_the_commit_can_be_chosen(hub: UploadHub, packed_folder: Path) -> None:
    push(packed_folder, REPO, commit_message="β = 1")
    assert hub.messages == ["β = 1"]


# figures of an evaluation


def test_the_figures_beside_the_weights_go_into_the_card(
    hub: UploadHub, packed_folder: Path
) -> None:
    result = {
        "task": {"type": "text-generation", "name": "Text generation"},
        "dataset": {"type": "wikitext", "name": "WikiText-2"},
        "metric": {"type": "perplexity", "name": "perplexity"},
        "value": 5.5,
        "dense_value": 5.25,
        "stderr": None,
    }
    (packed_folder / "emp_eval.json").write_text(json.dumps({"results": [result]}))
    push(packed_folder, REPO)
    card = hub.files(REPO)["README.md"].decode()
    assert "| Text generation | WikiText-2 | perplexity | 5.5 | 5.25 |" in card
    (index,) = yaml.safe_load(card.split("---\n")[1])["model-index"]
    assert index["name"] == "model"
    assert index["results"][0]["metrics"][0]["value"] == 5.5


def test_a_packed_model_without_a_report_gets_a_card_that_says_how_to_load_it(
    hub: UploadHub, packed_folder: Path
) -> None:
    (packed_folder / "emp_report.json").unlink()
    (packed_folder / "README.md").unlink()
    done = push(packed_folder, REPO)
    assert done["files"] == len(hub.files(REPO))
    card = hub.files(REPO)["README.md"].decode()
    assert "pip install emp-llm" in card.partition("```python")[0]
    assert 'from_pretrained("me/model")' in card


def test_nothing_but_the_hubs_own_bars_is_printed(
    packed_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    disable_progress_bars()
    try:
        push(packed_folder, REPO)
    finally:
        enable_progress_bars()
    assert capfd.readouterr() == ("", "")


def test_progress_is_that_of_the_verification(packed_folder: Path) -> None:
    class Told(Silent):
        def begin(self, stage: str, total: int) -> None:
            stages.append((stage, total))

    stages: list[tuple[str, int]] = []
    push(packed_folder, REPO, progress=Told())
    assert stages == [("verifying", verify(packed_folder)["bytes"])]


@pytest.mark.parametrize("revision", [None, "v1"])
def test_what_was_uploaded_loads_by_its_id(
    tiny_model: TinyModel, tmp_path: Path, revision: str | None
) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny_model("llama", sharded=True)
    prune(source, tmp_path / "packed")
    push(tmp_path / "packed", REPO, revision=revision)
    prune(source, tmp_path / "dense", PruneOptions(output_format="dense"))
    loaded = AutoModelForCausalLM.from_pretrained(REPO, revision=revision or "main")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert differing(loaded.state_dict(), expected.state_dict()) == []


def test_a_lossless_folder_is_uploaded_and_packed_from_the_hub_alike(
    hub: UploadHub, wide_model: TinyModel, wide_packed: TinyModel, tmp_path: Path
) -> None:
    folder = wide_packed("llama", targets="none")
    push(folder, REPO)
    there = hub.files(REPO)
    assert without_card(there) == without_card(files(folder))
    card = there["README.md"].decode()
    assert "packed without loss" in card
    assert f'from_pretrained("{REPO}")' in card
    assert "pruned" not in yaml.safe_load(card.split("---")[1])["tags"]
    assert "emp_report.svg" not in there
    hub.commit("me/dense", files(wide_model("llama")))
    pack("me/dense", tmp_path / "out")
    name = "model.safetensors"
    assert files(tmp_path / "out")[name] == files(folder)[name]
    assert verify(tmp_path / "out", against="me/dense")["pruned_tensors"] == 0
    unpack(REPO, tmp_path / "dense")
    assert (
        differing(load_file(tmp_path / "dense" / name), load_file(wide_model("llama") / name)) == []
    )
