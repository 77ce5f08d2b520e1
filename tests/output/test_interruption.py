"""A run that is stopped leaves no output but what it finished, and two never write one folder."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.checkpoints import (
    F,
    H,
    files,
    gaussian,
    kept_unfinished,
    llama_config,
    mlp,
    visible,
    write_checkpoint,
)

from emp_llm import OutputError, PruneOptions, prune

# every read takes a while: a large checkpoint for the price of a small one
SLOW = """
import os, time
preadv = os.preadv
def slow(*args):
    time.sleep(0.1)
    return preadv(*args)
os.preadv = slow
from emp_cli import main
main()
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    many = {f"other.{i}": gaussian(8) for i in range(1000)}
    return write_checkpoint(tmp_path / "source", llama_config(H, F), mlp(H, F), many)


@pytest.fixture
def start(source: Path, tmp_path: Path) -> Iterator[Start]:
    """Start a slow prune and wait until it writes; ends it after the test."""
    processes: list[subprocess.Popen[str]] = []

    def run(*options: str) -> subprocess.Popen[str]:
        out = tmp_path / "out"
        command = [sys.executable, "-c", SLOW, "prune", str(source), "--out", str(out), *options]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        give_up = time.monotonic() + 60
        while not any(out.rglob("*.safetensors.unfinished")):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < give_up
            time.sleep(0.02)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen[str], number: int) -> tuple[int, list[str], float]:
    """Send a signal; exit status, lines on stderr but for progress, and seconds to the end."""
    began = time.monotonic()
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    seconds = time.monotonic() - began
    lines = [line for line in errors.splitlines() if not line.startswith("pruning")]
    return process.returncode, lines, seconds


def test_ctrl_c_ends_a_run_soon_with_one_line_and_leaves_no_folder(
    start: Start, tmp_path: Path
) -> None:
    status, lines, seconds = end(start("--threads", "3"), signal.SIGINT)
    assert status == 130
    assert lines == ["interrupted: no output was kept; run the command again"]
    assert not (tmp_path / "out").exists()
    assert seconds < 4  # about half a second, on a machine with nothing else to do


def test_a_terminated_run_ends_soon_and_leaves_the_older_checkpoint(
    start: Start, tmp_path: Path
) -> None:
    other = write_checkpoint(tmp_path / "other", llama_config(H, F), mlp(H, F))
    prune(other, tmp_path / "out")
    before = files(tmp_path / "out")
    status, lines, seconds = end(start("--overwrite"), signal.SIGTERM)
    assert status == 128 + signal.SIGTERM
    assert len(lines) <= 1
    assert files(tmp_path / "out") == before
    assert seconds < 4


def test_while_one_run_writes_a_folder_another_is_refused_and_what_a_killed_one_left_is_cleared(
    start: Start, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start()
    with pytest.raises(OutputError, match="another emp-llm is writing there"):
        prune(source, out)
    assert process.poll() is None
    end(process, signal.SIGKILL)
    assert not (out / "config.json").exists()
    assert list(out.iterdir()) != []
    prune(source, out)
    prune(source, tmp_path / "expected")
    assert files(out) == files(tmp_path / "expected")


@pytest.mark.parametrize("granularity", ["row", "model"])
def test_an_interruption_in_the_library_leaves_no_thread_and_no_more_than_finished_shards(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, granularity: str
) -> None:
    import threading

    preadv, calls = os.preadv, iter(range(1 << 20))

    def read(*args):
        if next(calls) == 5:
            signal.raise_signal(signal.SIGINT)  # what the terminal sends, to the main thread
        return preadv(*args)

    monkeypatch.setattr("os.preadv", read)
    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "out", PruneOptions(granularity=granularity))
    assert visible(tmp_path / "out") == {}
    kept_unfinished(tmp_path / "out")  # asserts that there is nothing else
    assert [thread for thread in threading.enumerate() if thread.name.startswith("emp-")] == []
