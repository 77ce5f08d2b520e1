"""The folder that is written: which one is taken, and what in it is left alone."""

import fcntl
import os
from pathlib import Path

import pytest
import torch
from support.checkpoints import (
    UP,
    F,
    H,
    files,
    llama_config,
    refusal,
    visible,
    write_checkpoint,
)

from emp_llm import CheckpointError, OutputError, prune, unpack
from emp_llm.output import journal
from emp_llm.output.output_folder import STAGING_NAME, OutputFolder


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
def test_a_folder_inside_the_source_is_not_written_to(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    """It would be one of the source's files, and copied by the next run."""
    (tmp_path / "link").symlink_to(source)
    (source / "there").mkdir()
    (tmp_path / "leads in").symlink_to(source / "there")
    inside = ["there", "sparse", "a/b/sparse", "../source/sparse", "../link/sparse"]
    monkeypatch.chdir(source)
    outs = [Path(name) for name in inside] + [tmp_path / "leads in", tmp_path / "link" / "sparse"]
    for model in (source, tmp_path / "link"):
        for out in outs:
            message = refusal(model, out, OutputError, overwrite=overwrite)
            assert message.startswith(f"{out}: lies inside the source")


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_holds_the_source_is_not_written_to(
    source: Path, tmp_path: Path, overwrite: bool
) -> None:
    (tmp_path / "link").symlink_to(source)
    for model, out in ((source, tmp_path), (tmp_path / "link", tmp_path / "source" / "..")):
        message = refusal(model, out, OutputError, overwrite=overwrite)
        assert (
            message == f"{out}: holds the source ({model}), which is kept; give another folder "
            "to write to"
        )


def test_a_folder_with_files_that_the_source_links_to_is_not_written_to(
    source: Path, tmp_path: Path
) -> None:
    """As in the Hub's cache, whose snapshots are links."""
    (tmp_path / "blobs").mkdir()
    (source / "model.safetensors").rename(tmp_path / "blobs" / "model.safetensors")
    (source / "model.safetensors").symlink_to("../blobs/model.safetensors")

    message = refusal(source, tmp_path / "blobs", OutputError, overwrite=True)

    assert f"holds the source ({source / 'model.safetensors'})" in message


@pytest.mark.parametrize("place", ["snapshots/*/sparse", "snapshots", ".", "blobs"])
def test_the_hubs_copy_of_the_source_is_not_written_to(
    model: str, cache: Path, tmp_path: Path, place: str
) -> None:
    prune(model, tmp_path / "out")
    snapshot = next((cache / "snapshots").iterdir())
    before = files(cache)
    out = cache / place.replace("*", snapshot.name)

    with pytest.raises(OutputError, match=r"(lies inside|holds) the source"):
        prune(model, out, overwrite=True)

    assert files(cache) == before


def test_a_folder_beside_the_source_whose_name_begins_alike_is_written(source: Path) -> None:
    out = source.with_name("source-sparse")
    prune(source, out)
    prune(source, source / ".." / "source sparse")
    assert files(out) == files(source.with_name("source sparse"))


def test_unpack_does_not_write_inside_its_source(packed_folder: Path) -> None:
    with pytest.raises(OutputError, match="lies inside the source"):
        unpack(packed_folder, packed_folder / "dense")
    assert not (packed_folder / "dense").exists()


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

    monkeypatch.setattr(journal, "describe_shard", fail)
    with pytest.raises(type(error), match=str(error)):
        prune(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


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
