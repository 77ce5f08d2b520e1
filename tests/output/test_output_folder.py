"""The folder that is written: whole, or as it was before, whatever fails."""

import errno
import fcntl
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import (
    UP,
    F,
    H,
    files,
    kept_unfinished,
    llama_config,
    refusal,
    visible,
    write_checkpoint,
)

from emp_llm import CheckpointError, OutputError, PruneOptions, prune, unpack
from emp_llm.output import journal
from emp_llm.output.output_folder import STAGING_NAME, OutputFolder

FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


def test_a_folder_that_is_not_empty_is_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert "--overwrite" in refusal(source, out, OutputError)


def test_an_empty_folder_is_used(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    prune(source, tmp_path / "out")
    assert "config.json" in files(tmp_path / "out")


def test_an_empty_folder_is_still_there_after_a_failure(tmp_path: Path) -> None:
    tensors = {UP: torch.full((F, H), float("nan"))}
    source = write_checkpoint(tmp_path / "source", llama_config(H, F), tensors)
    (tmp_path / "out").mkdir()
    refusal(source, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_folders_on_the_way_to_the_output_go_again_after_a_failure(tmp_path: Path) -> None:
    tensors = {UP: torch.full((F, H), float("nan"))}
    source = write_checkpoint(tmp_path / "source", llama_config(H, F), tensors)
    refusal(source, tmp_path / "a" / "b" / "out")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_source_is_not_written_to(source: Path, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "link").symlink_to(source)
    for out in (source, tmp_path / "link", source / ".." / "source"):
        message = refusal(source, out, OutputError, overwrite=overwrite)
        assert "is the source itself" in message


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_is_no_folder_to_write_to(source: Path, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        prune(source, tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_file_on_the_way_to_the_output_is_one_line(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    refusal(source, tmp_path / "file" / "out", OutputError)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_one_line(source: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "Permission denied" in refusal(source, tmp_path / "locked" / "out", OutputError)


def test_a_folder_that_another_run_writes_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with OutputFolder(out, overwrite=False, source=source) as first:
        (first.staging / "unfinished").write_text("of the first run")
        with pytest.raises(OutputError, match="another emp-llm is writing there"):
            prune(source, out)
        assert (first.staging / "unfinished").read_text() == "of the first run"


# Disks that fail


def limit_disk(monkeypatch: pytest.MonkeyPatch, room: int) -> Callable[[], int]:
    """Let os.pwrite take so many bytes, then find the disk full; returns what is left of them."""
    pwrite, lock = os.pwrite, threading.Lock()

    def write(fd: int, data: memoryview, offset: int) -> int:
        nonlocal room
        with lock:
            if room == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count = pwrite(fd, memoryview(data)[:room], offset)
            room -= count
            return count

    monkeypatch.setattr("os.pwrite", write)
    return lambda: room


@pytest.mark.parametrize("output_format", ["packed", "dense"])
@pytest.mark.parametrize("part", ["nothing", "a byte", "half", "all but the headers", "nearly all"])
def test_a_full_disk_is_told_and_only_finished_shards_are_left(
    sharded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    output_format: str,
) -> None:
    out, plenty = tmp_path / "out", 1 << 30
    with monkeypatch.context() as patch:
        left = limit_disk(patch, plenty)
        prune(sharded, tmp_path / "fits", PruneOptions(output_format=output_format))
        needed = plenty - left()
    last_header = int.from_bytes((tmp_path / "fits" / SECOND).read_bytes()[:8], "little")
    rooms = {
        "nothing": 0,
        "a byte": 1,
        "half": needed // 2,
        "all but the headers": needed - last_header,
        "nearly all": needed - 1,
    }
    limit_disk(monkeypatch, rooms[part])
    message = refusal(sharded, out, OutputError, output_format=output_format)
    assert "the disk is full" in message
    monkeypatch.undo()
    prune(sharded, out, PruneOptions(output_format=output_format))
    assert files(out) == files(tmp_path / "fits")


@pytest.mark.parametrize("name", ["config.json", "emp_report.json", "README.md"])
def test_a_disk_that_is_full_for_a_small_file_is_told(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_text = Path.write_text

    def write(path: Path, *args: object, **kwargs: object) -> int:
        if path.name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_text(path, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", write)
    assert "the disk is full" in refusal(source, tmp_path / "out", OutputError)


@pytest.mark.parametrize("flush_every", [100, 1 << 30])
def test_data_that_does_not_reach_the_disk_is_told(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flush_every: int
) -> None:
    def fail(_fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("emp_llm.files.direct_file._O_DIRECT", 0)
    monkeypatch.setattr("emp_llm.files.direct_file._FLUSH_EVERY", flush_every)
    monkeypatch.setattr("os.fsync", fail)
    assert "Input/output error" in refusal(source, tmp_path / "out", OutputError)


@pytest.mark.parametrize("granularity", ["row", "layer", "model"])
@pytest.mark.parametrize("call", [0, 3, 6])
def test_a_read_that_fails_is_told_with_its_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, granularity: str
) -> None:
    preadv, calls = os.preadv, iter(range(1 << 20))

    def read(fd: int, buffers: list[memoryview], offset: int) -> int:
        if next(calls) >= call:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return preadv(fd, buffers, offset)

    monkeypatch.setattr("os.preadv", read)
    message = refusal(source, tmp_path / "out", granularity=granularity)
    assert message.startswith("model.safetensors: reading at byte")
    assert "Input/output error" in message


def test_a_source_that_shrinks_while_it_is_read_is_told(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, path = os.preadv, source / "model.safetensors"

    def read(fd: int, buffers: list[memoryview], offset: int) -> int:
        os.truncate(path, 700)
        return preadv(fd, buffers, offset)

    monkeypatch.setattr("os.preadv", read)
    message = refusal(source, tmp_path / "out")
    assert "it changed while it was read" in message


def test_reads_and_writes_of_a_few_bytes_at_a_time_give_the_same_files(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(sharded, tmp_path / "at once")
    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr("os.preadv", lambda fd, b, at: preadv(fd, [memoryview(b[0])[:7]], at))
    monkeypatch.setattr("os.pwrite", lambda fd, data, at: pwrite(fd, memoryview(data)[:5], at))
    prune(sharded, tmp_path / "bit by bit")
    assert files(tmp_path / "bit by bit") == files(tmp_path / "at once")


@pytest.mark.parametrize("call", [0, 1, 3])
@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")])
def test_a_run_that_is_stopped_while_files_get_their_place_leaves_what_is_finished(
    sharded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    call: int,
) -> None:
    replace, calls = Path.replace, iter(range(1 << 20))

    def fail(path: Path, target: Path) -> Path:
        if target.parent == tmp_path / "out" and next(calls) == call:
            raise failure
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises((KeyboardInterrupt, OutputError)):
        prune(sharded, tmp_path / "out")
    assert visible(tmp_path / "out") == {}
    assert kept_unfinished(tmp_path / "out") == [FIRST, SECOND]
    prune(sharded, tmp_path / "out")
    prune(sharded, tmp_path / "expected")
    assert files(tmp_path / "out") == files(tmp_path / "expected")


# --overwrite


@pytest.fixture
def older(sharded: Path, tmp_path: Path) -> Path:
    """A folder with an older, sharded checkpoint and files of the user's own."""
    out = tmp_path / "out"
    prune(sharded, out, PruneOptions(beta=0.5))
    (out / "notes").mkdir()
    (out / "notes" / "results.txt").write_text("mine")
    (out / "plot.png").write_bytes(b"mine, too")
    return out


def test_overwrite_replaces_the_older_checkpoint_and_keeps_other_files(
    source: Path, older: Path, tmp_path: Path
) -> None:
    prune(source, older, overwrite=True)
    prune(source, tmp_path / "new")
    own = {"notes/results.txt": b"mine", "plot.png": b"mine, too"}
    assert files(older) == files(tmp_path / "new") | own


def test_a_failed_overwrite_leaves_the_older_checkpoint_as_it_was(
    source: Path, older: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_disk(monkeypatch, 100)
    refusal(source, older, OutputError, overwrite=True)


def test_what_was_set_aside_is_kept_where_it_cannot_be_put_back_and_is_by_the_next_command(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(source, tmp_path / "packed")
    prune(source, tmp_path / "out")
    before = files(tmp_path / "out")
    replace, broken = os.replace, threading.Event()

    def fail(moved: Path, to: Path) -> None:
        if moved == tmp_path / "out" / STAGING_NAME / "config.json":
            broken.set()  # the disk fails from here on
        if broken.is_set():
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(to))
        replace(moved, to)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OutputError, match="Input/output error") as caught:
            unpack(tmp_path / "packed", tmp_path / "out", overwrite=True)
    assert "puts back what was there" in caught.value.__notes__[0]
    with pytest.raises(OutputError, match="is not empty"):
        unpack(tmp_path / "packed", tmp_path / "out")
    assert visible(tmp_path / "out") == before


@pytest.mark.parametrize("name", ["README.md", "config.json"])
def test_a_file_that_came_while_the_run_went_on_is_not_replaced(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    publish = OutputFolder.publish

    def come(folder: OutputFolder) -> None:
        (folder.path / name).write_text("mine")
        publish(folder)

    with monkeypatch.context() as patch:
        patch.setattr(OutputFolder, "publish", come)
        with pytest.raises(OutputError, match=f"{name} was not there when this run began"):
            prune(source, tmp_path / "out")
    assert visible(tmp_path / "out") == {name: b"mine"}
    (tmp_path / "out" / name).unlink()
    prune(source, tmp_path / "out")
    prune(source, tmp_path / "expected")
    assert files(tmp_path / "out") == files(tmp_path / "expected")


@pytest.mark.parametrize("made_again", [False, True])
def test_a_hidden_folder_that_went_while_it_was_locked_is_not_taken_for_ones_own(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_again: bool
) -> None:
    staging = tmp_path / "out" / STAGING_NAME
    flock = fcntl.flock

    def lock(descriptor: int, how: int) -> None:
        flock(descriptor, how)
        staging.rmdir()
        if made_again:
            staging.mkdir()
            (staging / "of another").write_text("run")

    monkeypatch.setattr(fcntl, "flock", lock)
    with pytest.raises(OutputError, match="another emp-llm is writing there"):
        prune(source, tmp_path / "out")
    assert staging.exists() == made_again
    if made_again:
        assert (staging / "of another").read_text() == "run"


@pytest.mark.parametrize("error", [CheckpointError("cannot be read back"), ValueError("a bug")])
def test_a_shard_that_cannot_be_recorded_ends_the_run(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(_path: Path) -> None:
        raise error

    monkeypatch.setattr(journal, "describe_file", fail)
    with pytest.raises(type(error), match=str(error)):
        prune(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_overwrite_that_cannot_put_a_file_in_its_place_leaves_the_older_checkpoint(
    source: Path, older: Path
) -> None:
    (source / "notes").write_text("a file where the output has a folder")
    refusal(source, older, OutputError, overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_a_link_in_the_place_of_the_hidden_folder_leads_to_is_not_emptied(
    source: Path, tmp_path: Path, overwrite: bool
) -> None:
    home, out = tmp_path / "home", tmp_path / "out"
    for folder in (home, out):
        folder.mkdir()
    (home / "thesis.txt").write_text("mine")
    (out / ".emp-llm-unfinished").symlink_to(home)
    assert "is a link: remove it" in refusal(source, out, OutputError, overwrite=overwrite)
    assert files(home) == {"thesis.txt": b"mine"}
    assert list(out.iterdir()) == [out / ".emp-llm-unfinished"]


@pytest.mark.parametrize("present", [{}, {"config.json": b"{}"}], ids=["empty", "of that name"])
def test_an_overwrite_follows_no_link_out_of_the_folder(
    source: Path, tmp_path: Path, present: dict[str, bytes]
) -> None:
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "config.json").write_text("{}")
    prune(source, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "1_Pooling")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name, data in present.items():
        (elsewhere / name).write_bytes(data)
    (tmp_path / "out" / "1_Pooling").symlink_to(elsewhere)
    message = refusal(source, tmp_path / "out", OutputError, overwrite=True)
    assert "1_Pooling: is a link out of" in message
    assert files(elsewhere) == present


@pytest.mark.parametrize(
    "content",
    [b"[]", b"{}", b'{"files": 1}', b'{"files": [1]}', b"[" * 100_000, b'{"files": ["x"]}'],
    ids=["list", "nothing", "number", "numbers", "deep", "not there"],
)
def test_what_strangers_left_in_the_hidden_folder_is_cleared(
    source: Path, tmp_path: Path, content: bytes
) -> None:
    staging = tmp_path / "out" / ".emp-llm-unfinished"
    staging.mkdir(parents=True)
    for name in (".moving.json", ".run.json"):
        (staging / name).write_bytes(content)
    prune(source, tmp_path / "out", overwrite=True)
    assert not staging.exists()


def test_moves_that_strangers_tell_of_are_not_taken_back_from_elsewhere(
    source: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    staging = tmp_path / "out" / ".emp-llm-unfinished"
    staging.mkdir(parents=True)
    (staging / ".moving.json").write_text('{"files": ["../thesis.txt"]}')
    with pytest.raises(OutputError, match="is a link out of"):
        prune(source, tmp_path / "out", overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
