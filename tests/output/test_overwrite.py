"""`--overwrite`: the older checkpoint is replaced, or is as it was, whatever fails."""

import errno
import os
import shutil
import threading
from pathlib import Path

import pytest
from support.checkpoints import (
    files,
    refusal,
    visible,
)
from support.full_disk import limit_disk

from emp_llm import OutputError, PruneOptions, prune, unpack
from emp_llm.output.output_folder import STAGING_NAME


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


def test_an_overwrite_that_cannot_put_a_file_in_its_place_leaves_the_older_checkpoint(
    source: Path, older: Path
) -> None:
    (source / "notes").write_text("a file where the output has a folder")
    refusal(source, older, OutputError, overwrite=True)


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
