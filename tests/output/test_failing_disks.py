"""Disks that are full or fail, while files are read, written and moved."""

import errno
import os
from pathlib import Path

import pytest
from support.checkpoints import (
    files,
    kept_unfinished,
    refusal,
    visible,
)
from support.full_disk import limit_disk

from emp_llm import OutputError, PruneOptions, prune

FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


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
