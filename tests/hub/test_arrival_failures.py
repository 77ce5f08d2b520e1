"""A download that breaks off is one line or a quiet end, and the next run goes on from there."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from emp_cli import main
from support.arriving import SHARDS, in_cache, wait_for, weights
from support.checkpoints import files, kept_unfinished, visible
from support.hub_server import HubServer, lead_client
from support.processes import start

from emp_llm import HubError, prune
from emp_llm.output.output_folder import STAGING_NAME


@pytest.fixture(autouse=True)
def _no_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # between huggingface_hub's tries


def refusal(model: str, out: Path, **options: bool) -> str:
    with pytest.raises(HubError) as caught:
        prune(model, out, **options)
    assert visible(out) == {}
    assert "\n" not in str(caught.value)
    assert wait_for(lambda: "emp-fetch" not in [thread.name for thread in threading.enumerate()])
    return str(caught.value)


def test_after_a_drop_a_second_run_goes_on_with_the_shard_that_broke(
    hub: HubServer, model: str, tmp_path: Path, cache: Path
) -> None:
    hub.cut[SHARDS[1]] = 300_000
    message = refusal(model, tmp_path / "out")
    assert message.startswith(f"{model}: the connection to {hub.url} failed")
    assert "files that are complete are kept" in message
    assert in_cache(cache) == kept_unfinished(tmp_path / "out") == SHARDS[:1]
    hub.cut.clear()
    hub.requests.clear()
    prune(model, tmp_path / "out")
    assert hub.downloads() == SHARDS[1:]


def test_after_a_drop_with_discarding_a_second_run_completes(
    hub: HubServer, model: str, local: Path, tmp_path: Path
) -> None:
    hub.cut[SHARDS[2]] = 300_000
    assert "the connection to" in refusal(model, tmp_path / "out", discard_source=True)
    assert kept_unfinished(tmp_path / "out") == SHARDS[:2]
    hub.cut.clear()
    hub.requests.clear()
    prune(model, tmp_path / "out", discard_source=True)
    assert hub.downloads() == SHARDS[2:]  # the others were deleted, and are not needed again
    prune(local, tmp_path / "expected")
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")


def test_what_the_hub_refuses_midway_is_the_same_one_line(
    hub: HubServer, model: str, tmp_path: Path
) -> None:
    def refuse(name: str) -> None:
        if name == SHARDS[0]:
            hub.status = 403

    hub.on_download = refuse
    message = refusal(model, tmp_path / "out")
    assert message.startswith(f"{model}: the token does not allow this: give it the right")


def test_a_shard_with_another_header_than_the_one_planned_for_is_refused(
    hub: HubServer, local: Path, tmp_path: Path
) -> None:
    commit = hub.commit("me/model", files(local))
    content = hub.models["me/model"].commits[commit]

    def swap(name: str) -> None:
        if name == SHARDS[1]:
            content[name] = content[name].replace(b"up_proj", b"pu_proj")

    hub.on_download = swap
    message = refusal("me/model", tmp_path / "out")
    assert message.startswith(f"me/model: {SHARDS[1]} has another header in the cache than on")
    assert "delete " in message


def test_a_header_that_is_damaged_on_the_hub_is_refused_before_data_is_fetched(
    hub: HubServer, local: Path, tmp_path: Path
) -> None:
    content = files(local)
    hub.commit("me/model", content | {SHARDS[2]: b"\xff" * 400})
    message = refusal("me/model", tmp_path / "out")
    assert message.startswith(f"me/model: {SHARDS[2]}: says its header is")
    assert [name for name in hub.downloads() if name in SHARDS] == []


def test_a_broken_look_at_a_header_is_tried_again(
    hub: HubServer, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.cut[SHARDS[0]] = 100
    monkeypatch.setattr("time.sleep", lambda _: hub.cut.clear())
    prune(model, tmp_path / "out")


def test_offline_a_shard_that_is_missing_is_refused(
    hub: HubServer, model: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(model, tmp_path / "out")
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    prune(model, tmp_path / "again")
    assert weights(tmp_path / "again") == weights(tmp_path / "out")
    next(cache.glob(f"snapshots/*/{SHARDS[3]}")).unlink()
    assert "me/model is not complete in the cache" in refusal(model, tmp_path / "third")
    assert hub.requests == []


@pytest.fixture
def stalled(hub: HubServer) -> Iterator[threading.Event]:
    """The server says no more when the second shard is asked for, until the event is set."""
    go_on = threading.Event()

    def stall(name: str) -> None:
        if name == SHARDS[1]:
            go_on.wait(120)

    hub.on_download = stall
    yield go_on
    go_on.set()


def run_command(url: str, home: Path, *arguments: str) -> None:
    """Be the command, with a client that knows that Hub."""
    lead_client(pytest.MonkeyPatch(), url, home)
    sys.argv = ["emp-llm", *arguments]
    main()


@pytest.mark.parametrize("options", [[], ["--granularity", "model"], ["--discard-source"]])
def test_ctrl_c_ends_a_run_that_waits_for_a_shard_and_leaves_nothing_unfinished(
    hub: HubServer,
    model: str,
    tmp_path: Path,
    cache: Path,
    stalled: threading.Event,
    options: list[str],
) -> None:
    command = ["prune", model, "--out", str(tmp_path / "out"), *options]
    printed = tmp_path / "printed"
    process = start(run_command, hub.url, tmp_path / "home", *command, output=printed)
    first = tmp_path / "out" / STAGING_NAME / SHARDS[0]
    assert wait_for(lambda: SHARDS[1] in hub.downloads() or not process.is_alive())
    assert "model" in options or wait_for(lambda: first.exists() or not process.is_alive())
    threading.Event().wait(0.2)  # a thread waits for the second shard now
    began = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    process.join(30)
    assert process.exitcode == 130
    errors = printed.read_text()
    assert errors.splitlines()[-1].startswith("interrupted: ")
    assert "Traceback" not in errors
    assert visible(tmp_path / "out") == {}
    assert kept_unfinished(tmp_path / "out") == ([] if "model" in options else SHARDS[:1])
    assert not stalled.is_set()
    assert in_cache(cache) == ([] if "--discard-source" in options else SHARDS[:1])
    assert list(cache.glob("blobs/*.incomplete")) == []
    assert time.monotonic() - began < 4  # about a second, on a machine with nothing else to do


def test_an_interruption_in_the_library_leaves_no_thread_that_downloads_on(
    hub: HubServer, model: str, tmp_path: Path, cache: Path, stalled: threading.Event
) -> None:
    began: list[float] = []

    def interrupt() -> None:
        assert wait_for(lambda: SHARDS[1] in hub.downloads())
        assert wait_for((tmp_path / "out" / STAGING_NAME / SHARDS[0]).exists)
        threading.Event().wait(0.2)  # a thread waits for the second shard now
        began.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    interrupter = threading.Thread(target=interrupt)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        prune(model, tmp_path / "out")
    assert time.monotonic() - began[0] < 4
    interrupter.join()
    assert kept_unfinished(tmp_path / "out") == SHARDS[:1]
    stalled.set()
    assert wait_for(lambda: not [t for t in threading.enumerate() if t.name.startswith("emp-")])
    assert in_cache(cache) == SHARDS[:1]
    assert SHARDS[2] not in hub.downloads()
    hub.on_download = lambda _name: None
    prune(model, tmp_path / "out")
