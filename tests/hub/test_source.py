"""Models are fetched from the Hub with the real client, from a server on the loopback interface."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save
from support.hub_server import HubServer

from emp_llm.errors import HubError
from emp_llm.hub.source import Source, find_source
from emp_llm.runtime.progress import Progress, SharedProgress, Silent

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = b'{"weight_map": {"a": "%s", "b": "%s"}}' % (FIRST.encode(), SECOND.encode())
SINGLE = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": save({"a": np.zeros(50_000, np.float32)}),
    "tokenizer.json": b"tokens",
}
SHARDED = {
    "config.json": b"{}",
    "model.safetensors.index.json": INDEX,
    FIRST: save({"a": np.ones(3)}),
    SECOND: save({"b": np.zeros(50_000)}),
}


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def fetch(model: str, *, progress: Progress | None = None, **options: object) -> Source:
    """Find a model and wait until all of its files are there."""
    told = SharedProgress(progress or Silent())
    source = find_source(model, progress=told, **options)
    shards = source.open_checkpoint().shards
    with source.files(shards) as files:
        told.begin("waiting", 0)
        for shard in shards:
            files.file(shard)
    return source


def refusal(model: str, **options: str) -> str:
    with pytest.raises(HubError) as caught:
        fetch(model, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


class Told:
    """Progress as it was told."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.done: list[int] = []

    def begin(self, stage: str, total: int) -> None:
        self.stages.append((stage, total))
        self.done.append(0)

    def advance(self, nbytes: int) -> None:
        self.done[-1] += nbytes


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("model", ["me/model", "gpt2"])
def test_a_model_is_fetched_by_its_id(hub: HubServer, model: str) -> None:
    commit = hub.commit(model, SINGLE)
    source = fetch(model)
    assert (source.repo_id, source.revision) == (model, commit)
    assert contents(source.folder) == SINGLE
    assert list(source.open_checkpoint().tensors) == ["a"]


@pytest.mark.parametrize("branch", ["v2", "refs/pr/1"])
def test_a_branch_is_fetched_by_its_name(hub: HubServer, branch: str) -> None:
    hub.commit("me/model", SINGLE)
    commit = hub.commit("me/model", SHARDED, branch=branch)
    source = fetch("me/model", revision=branch)
    assert source.revision == commit
    assert contents(source.folder) == SHARDED


def test_a_commit_is_fetched_by_its_hash(hub: HubServer) -> None:
    old = hub.commit("me/model", SINGLE)
    hub.commit("me/model", SHARDED)
    source = fetch("me/model", revision=old)
    assert source.revision == old
    assert contents(source.folder) == SINGLE


def test_of_the_weights_only_the_shards_that_the_index_names_are_fetched(hub: HubServer) -> None:
    stale = "model-00003-of-00003.safetensors"
    hub.commit("me/model", {**SHARDED, "consolidated.safetensors": b"x", stale: b"x"})
    source = fetch("me/model")
    assert contents(source.folder) == SHARDED
    assert list(source.open_checkpoint().tensors) == ["a", "b"]


def test_weights_in_other_formats_are_not_fetched_and_reported(hub: HubServer) -> None:
    others = ["flax_model.msgpack", "model.gguf", "onnx/model.onnx", "pytorch_model.bin"]
    others += ["original/params.json", "original/consolidated.00.pth", ".gitattributes"]
    hub.commit("me/model", {**SINGLE, **{name: name.encode() for name in others}})
    source = fetch("me/model")
    assert contents(source.folder) == SINGLE
    left = {entry["path"]: entry["bytes"] for entry in source.open_checkpoint().beside.left_behind}
    assert left == {name: len(name) for name in others[:4]} | {"original/": 20 + 28}


def test_weights_of_other_modules_are_fetched(hub: HubServer) -> None:
    weights = ["2_Dense/model", "adapter_model", "mtp"]
    own = [*(f"{name}.safetensors" for name in weights), "mmproj.gguf"]
    files = {**SINGLE, **{name: name.encode() for name in own}}
    hub.commit("me/model", files)
    source = fetch("me/model")
    assert contents(source.folder) == files
    assert [str(file) for file in source.open_checkpoint().other_files] == sorted(
        [*own, "tokenizer.json"]
    )


def test_small_files_are_fetched_from_folders_and_under_odd_names(hub: HubServer) -> None:
    files = {**SINGLE, "1_Pooling/config.json": b"1", "notes [v1]*.txt": b"2", "empty.py": b""}
    hub.commit("me/model", files)
    assert contents(fetch("me/model").folder) == files


def test_what_is_in_the_cache_is_not_fetched_again(hub: HubServer) -> None:
    hub.commit("me/model", SINGLE)
    first = fetch("me/model")
    assert hub.downloads() == sorted(SINGLE)
    hub.requests.clear()
    assert fetch("me/model") == first
    assert hub.downloads() == []


def test_a_new_commit_is_noticed(hub: HubServer) -> None:
    hub.commit("me/model", SINGLE)
    fetch("me/model")
    commit = hub.commit("me/model", {**SINGLE, "tokenizer.json": b"new"})
    hub.requests.clear()
    assert fetch("me/model").revision == commit
    assert hub.downloads() == ["tokenizer.json"]


def test_offline_the_cache_is_enough(hub: HubServer, monkeypatch) -> None:
    hub.commit("me/model", SINGLE)
    first = fetch("me/model")
    hub.requests.clear()
    go_offline(monkeypatch)
    assert fetch("me/model") == first
    assert hub.requests == []


def test_a_cache_without_a_listing_is_enough_offline(hub: HubServer, monkeypatch) -> None:
    # as older clients and from_pretrained leave it
    hub.commit("me/model", SINGLE)
    first = fetch("me/model")
    shutil.rmtree(first.folder.parent.parent / "trees")
    monkeypatch.setattr("huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE", {})
    go_offline(monkeypatch)
    assert fetch("me/model") == first


def test_offline_what_is_not_in_the_cache_is_refused(hub: HubServer, monkeypatch) -> None:
    hub.commit("me/model", SINGLE)
    go_offline(monkeypatch)
    message = refusal("me/model")
    assert message.startswith("me/model is not complete in the cache")
    assert "unset" in message


def test_offline_a_model_of_which_a_file_is_missing_is_refused(hub: HubServer, monkeypatch) -> None:
    hub.commit("me/model", SINGLE)
    (fetch("me/model").folder / "tokenizer.json").unlink()
    go_offline(monkeypatch)
    assert "me/model is not complete in the cache" in refusal("me/model")


def test_with_the_hub_out_of_reach_the_cache_is_enough(hub: HubServer) -> None:
    hub.commit("me/model", SINGLE)
    first = fetch("me/model")
    hub.__exit__()
    assert fetch("me/model") == first


def test_with_the_hub_out_of_reach_what_is_not_in_the_cache_is_refused(hub: HubServer) -> None:
    hub.__exit__()
    message = refusal("me/model")
    assert f"the connection to {hub.url} failed" in message
    assert "Connection refused" in message
    assert "check the network, or the path if a folder is meant, then" in message


def test_a_dropped_connection_is_one_error_and_a_new_run_keeps_whole_files(
    hub: HubServer, monkeypatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    hub.commit("me/model", SHARDED)
    hub.cut[SECOND] = 300_000
    message = refusal("me/model")
    assert "the connection to" in message
    assert "run the command again, files that are complete are kept" in message
    hub.cut.clear()
    hub.requests.clear()
    assert contents(fetch("me/model").folder) == SHARDED
    assert hub.downloads() == [SECOND]


def test_a_connection_dropped_once_is_taken_up_where_it_broke(hub: HubServer, monkeypatch) -> None:
    hub.commit("me/model", SINGLE)
    hub.cut["model.safetensors"] = 150_000
    # as the client says that it tries again, the server is mended
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: hub.cut.clear())
    assert contents(fetch("me/model").folder) == SINGLE
    assert hub.downloads().count("model.safetensors") == 2


@pytest.mark.parametrize("token", ["", "hf_stranger"])
def test_a_gated_model_needs_its_terms_accepted(hub: HubServer, monkeypatch, token: str) -> None:
    hub.commit("me/gated", SINGLE, gated=True)
    monkeypatch.setenv("HF_TOKEN", token)
    message = refusal("me/gated")
    assert message.startswith(f"me/gated is gated: accept its terms at {hub.url}/me/gated")
    assert "hf auth login" in message


def test_the_token_of_the_environment_opens_a_gated_model(hub: HubServer, monkeypatch) -> None:
    hub.commit("me/gated", SINGLE, gated=True)
    hub.readers.add("hf_reader")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert contents(fetch("me/gated").folder) == SINGLE


def test_a_given_token_opens_a_private_model(hub: HubServer) -> None:
    hub.commit("me/private", SINGLE, private=True)
    hub.readers.add("hf_reader")
    assert contents(fetch("me/private", token="hf_reader").folder) == SINGLE


@pytest.mark.parametrize("model", ["me/private", "me/none"])
def test_a_model_that_is_not_to_be_seen_may_be_missing_or_private(
    hub: HubServer, model: str
) -> None:
    hub.commit("me/private", SINGLE, private=True)
    message = refusal(model)
    assert message.startswith(f"{model} is neither a local folder nor a model at {hub.url}")
    assert "hf auth login" in message


@pytest.mark.parametrize("revision", ["v3", "0123456789012345678901234567890123456789"])
def test_a_missing_revision_is_named(hub: HubServer, revision: str) -> None:
    hub.commit("me/model", SINGLE)
    assert f"me/model has no revision '{revision}'" in refusal("me/model", revision=revision)


def test_asking_for_a_token_without_being_logged_in_is_one_error(hub: HubServer) -> None:
    hub.commit("me/model", SINGLE)
    with pytest.raises(HubError, match=r"without a token: run `hf auth login`"):
        fetch("me/model", token=True)


@pytest.mark.parametrize(
    ("status", "reason"),
    [
        (401, "does not accept the token"),
        (403, "the token does not allow this"),
        (429, "fewer requests"),
        (503, "answered with status 503: wait some minutes"),
    ],
)
def test_a_refusal_of_the_hub_says_what_to_do(hub: HubServer, status: int, reason: str) -> None:
    hub.status = status
    assert reason in refusal("me/model")


BROKEN = {
    "no weights": (
        {"config.json": b"{}", "adapter_model.bin": b"x", "2_Dense/model.safetensors": b"y"},
        "me/model: holds a PEFT adapter, not a model: merge it into its base model first",
    ),
    "damaged weights": (
        {"config.json": b"{}", "pytorch_model.bin": b"x"},
        "me/model: pytorch_model.bin: is not a file of torch.save",
    ),
    "no config, and GGUF": ({"model.gguf": b"x"}, "me/model: holds only model.gguf, which is GGUF"),
    "a variant in shards": (
        {"config.json": b"{}", "model.safetensors.index.fp16.json": b"{}"},
        "me/model: has its weights only in the variant fp16: save them without one, by "
        "from_pretrained('me/model', variant='fp16') and save_pretrained",
    ),
    "no config": ({"model.safetensors": b"x"}, "me/model has no config.json"),
    "a damaged index": ({**SHARDED, "model.safetensors.index.json": b"{"}, "is not JSON"),
    "a shard missing": (
        {name: content for name, content in SHARDED.items() if name != SECOND},
        f"me/model: {SECOND} is missing",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_repository_without_a_sound_model_is_refused_before_its_weights_are_fetched(
    hub: HubServer, case: str
) -> None:
    files, reason = BROKEN[case]
    hub.commit("me/model", files)
    message = refusal("me/model")
    assert reason in message
    assert message.count("me/model: ") <= 1
    assert not [name for name in hub.downloads() if not name.endswith(".json")]


def test_a_file_that_was_cut_short_in_the_cache_is_refused(hub: HubServer) -> None:
    hub.commit("me/model", SINGLE)
    blob = (fetch("me/model").folder / "tokenizer.json").resolve()
    os.truncate(blob, 3)
    message = refusal("me/model")
    assert "tokenizer.json is 3 bytes in the cache and 6 on the Hub" in message
    assert f"delete {blob}" in message


def test_a_model_that_is_larger_than_the_disk_is_refused_before_it_is_fetched(
    hub: HubServer, monkeypatch
) -> None:
    hub.commit("me/model", SINGLE)
    real = shutil.disk_usage("/")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type(real)(10**9, 10**9 - 1000, 1000))
    message = refusal("me/model")
    size = len(SINGLE["model.safetensors"]) + len(SINGLE["tokenizer.json"])
    assert f"has 1,000 bytes free, {size:,} are needed" in message
    assert "set HF_HOME" in message
    assert hub.downloads() == ["config.json"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [(errno.ENOSPC, "the disk of the Hub's cache is full"), (errno.EACCES, "set HF_HOME")],
)
def test_a_cache_that_takes_no_more_is_one_error(
    hub: HubServer, monkeypatch, code: int, reason: str
) -> None:
    def fail(*_, **__) -> None:
        raise OSError(code, os.strerror(code), "somewhere")

    hub.commit("me/model", SINGLE)
    monkeypatch.setattr("huggingface_hub.file_download.http_get", fail)
    assert reason in refusal("me/model")


def test_progress_counts_the_bytes_of_all_files(hub: HubServer) -> None:
    hub.commit("me/model", SINGLE)
    told = Told()
    fetch("me/model", progress=told)
    small, shard = len(SINGLE["tokenizer.json"]), len(SINGLE["model.safetensors"])
    assert told.stages == [("downloading", small), ("fetching and waiting", shard)]
    assert told.done == [small, shard]


def test_nothing_is_printed(hub: HubServer, capfd: pytest.CaptureFixture[str]) -> None:
    hub.commit("me/model", SHARDED)
    fetch("me/model")
    assert capfd.readouterr() == ("", "")


def test_a_new_process_goes_by_its_environment(hub: HubServer, tmp_path: Path) -> None:
    commit = hub.commit("me/model", SINGLE, private=True)
    hub.readers.add("hf_reader")
    program = "import test_source; print(test_source.fetch('me/model').revision)"
    environment = {**os.environ, **hub.environment(tmp_path / "other"), "HF_TOKEN": "hf_reader"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])

    def run(**more: str) -> str:
        command = [sys.executable, "-c", program]
        return subprocess.check_output(command, env={**environment, **more}, text=True).strip()

    assert run() == commit
    hub.requests.clear()
    assert run(HF_HUB_OFFLINE="1") == commit
    assert hub.requests == []
