"""Files of other modules travel byte for byte, large ones resumably and in bounded memory."""

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash
from support.checkpoints import (
    F,
    H,
    files,
    llama_config,
    mlp,
    refusal,
    visible,
    write_checkpoint,
)
from support.full_disk import limit_disk
from support.processes import free_port, rank_environment, start

from emp_llm import CheckpointError, OutputError, PruneOptions, prune, unpack, verify
from emp_llm.output.output_folder import STAGING_NAME

LARGE = "2_Dense/model.safetensors"
"""Larger than what is copied at a time: it is journaled. Its name is a shard's, in a folder."""

CARRIED = {
    LARGE: np.random.default_rng(1).bytes(9_000_001),
    "adapter_model.safetensors": b"an adapter",
    "codec/speech/vocoder.pt": b"a vocoder",
    "mmproj-f16.gguf": b"",
    "tokenizer.json": b"{}",
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint with files of its own, copies of its weights, and what a training left."""
    folder = write_checkpoint(tmp_path / "model", llama_config(H, F), mlp(H, F))
    left = {"pytorch_model.bin": b"12345", "tf_model.h5": b"1", "checkpoint-3/optimizer.pt": b"12"}
    for name, data in (CARRIED | left).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def carried(folder: Path) -> dict[str, bytes]:
    written = files(folder)
    return {name: data for name, data in written.items() if name in CARRIED}


def prune_to(source: Path, out: Path, distributed: bool = False) -> None:
    prune(source, out, threads=2, distributed=distributed)


def test_files_of_other_modules_are_copied_counted_and_hashed(source: Path, tmp_path: Path) -> None:
    report = prune(source, tmp_path / "out")
    own = {"model.safetensors", "config.json", "README.md", "emp_report.json", "emp_report.svg"}
    assert files(tmp_path / "out").keys() == CARRIED.keys() | own
    assert carried(tmp_path / "out") == CARRIED
    assert report["carried"] == {"files": 5, "bytes": 9_000_001 + 10 + 9 + 0 + 2}
    for name, data in CARRIED.items():
        expected = {"bytes": len(data), "hash": f"xxh3-128:{xxhash.xxh3_128_hexdigest(data)}"}
        assert report["files"][name] == expected
    verify(tmp_path / "out", against=source)


def test_what_stays_behind_is_reported_with_its_reason(source: Path, tmp_path: Path) -> None:
    names = ("path", "reason", "files", "bytes")
    expected = [
        ("checkpoint-3/", "training leftovers", 1, 2),
        ("pytorch_model.bin", "the same weights in another file", 1, 5),
        ("tf_model.h5", "the same weights for TensorFlow", 1, 1),
    ]
    found = prune(source, tmp_path / "out")["left_behind"]
    assert [tuple(entry[name] for name in names) for entry in found] == expected


def test_unpacking_carries_them_too(source: Path, tmp_path: Path) -> None:
    prune(source, tmp_path / "packed")
    (tmp_path / "packed" / "tf_model.h5").write_bytes(b"of the user")
    found = unpack(tmp_path / "packed", tmp_path / "unpacked")
    prune(source, tmp_path / "dense", PruneOptions(output_format="dense"))
    assert files(tmp_path / "unpacked") == files(tmp_path / "dense")
    assert found["carried"] == {"files": 5, "bytes": 9_000_022}
    assert [entry["path"] for entry in found["left_behind"]] == ["tf_model.h5"]


def test_a_run_killed_while_it_copies_goes_on_and_writes_the_same_bytes(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    prune(source, tmp_path / "expected")
    expected, seen = files(tmp_path / "expected"), set()
    for step in (28, 33):  # in the middle of the copy, and after it
        run = start(prune_to, source, out, killed_at=step)
        run.join()
        assert run.exitcode == -9
        staging = out / STAGING_NAME
        copying = (staging / "2_Dense" / ".model.safetensors.unfinished").exists()
        seen.add((copying, (staging / LARGE).exists()))
        assert not (out / "config.json").exists()
        prune(source, out)
        assert files(out) == expected
        shutil.rmtree(out)
    assert seen == {(True, False), (False, True)}


@pytest.fixture
def unfinished(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the shard and the large file, of a run whose disk failed after these."""
    out = tmp_path / "out"

    def fail(*_: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("emp_llm.entrypoints.prune.write_index", fail)
        with pytest.raises(OutputError) as caught:
            prune(source, out)
    note = f"2 files are finished and kept in {out}: the same command goes on from there"
    assert caught.value.__notes__ == [note]
    assert visible(out) == {}
    kept = [name for name in files(out / STAGING_NAME) if not name.startswith(".")]
    assert sorted(kept) == [LARGE, "model.safetensors"]
    return out


def test_a_large_file_that_is_copied_is_not_copied_again(source: Path, unfinished: Path) -> None:
    inode = (unfinished / STAGING_NAME / LARGE).stat().st_ino
    prune(source, unfinished)
    assert (unfinished / LARGE).stat().st_ino == inode
    assert carried(unfinished) == CARRIED
    verify(unfinished, against=source)


def test_a_copy_that_was_damaged_since_is_made_again(source: Path, unfinished: Path) -> None:
    path = unfinished / STAGING_NAME / LARGE
    content = bytearray(path.read_bytes())
    content[5_000_000] ^= 1
    path.write_bytes(content)
    prune(source, unfinished)
    assert carried(unfinished) == CARRIED


def test_a_large_file_that_changed_since_is_refused(source: Path, unfinished: Path) -> None:
    os.utime(source / LARGE, ns=(1, 1))
    with pytest.raises(OutputError, match=rf"the source's {LARGE} has changed"):
        prune(source, unfinished)


def test_a_disk_that_is_full_for_a_copy_is_reported_and_the_shard_is_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        limit_disk(patch, 5_000_000)
        message = refusal(source, tmp_path / "out", OutputError)
    assert "the disk is full" in message
    prune(source, tmp_path / "out")
    assert carried(tmp_path / "out") == CARRIED


def test_a_file_that_shrinks_while_it_is_copied_is_refused(source: Path, tmp_path: Path) -> None:
    def shrink(fd: int, buffers: list[memoryview], offset: int) -> int:
        os.truncate(source / LARGE, 4_000_000)
        return preadv(fd, buffers, offset)

    preadv = os.preadv
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.preadv", shrink)
        with pytest.raises(CheckpointError, match=r"(has changed|ends too early)"):
            prune(source, tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()


def test_a_large_file_is_copied_and_verified_in_the_memory_of_a_few_blocks(
    source: Path, tmp_path: Path
) -> None:
    (source / LARGE).write_bytes(bytes(60_000_000))
    prune(source, tmp_path / "warm", threads=1)  # whatever is made once
    tracemalloc.start()
    prune(source, tmp_path / "out", threads=1)
    verify(tmp_path / "out", against=source, threads=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6


def test_several_ranks_write_what_one_does(source: Path, tmp_path: Path) -> None:
    port = free_port()
    ranks = [
        start(prune_to, source, tmp_path / "out", True, environment=rank_environment(r, 2, port))
        for r in range(2)
    ]
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    prune(source, tmp_path / "expected")
    assert files(tmp_path / "out") == files(tmp_path / "expected")


def test_an_overwrite_takes_away_weights_that_the_older_model_had_beside_it(
    source: Path, tmp_path: Path
) -> None:
    prune(source, tmp_path / "out")
    (tmp_path / "out" / "mine.pt").write_bytes(b"mine")
    plain = write_checkpoint(tmp_path / "plain", llama_config(H, F), mlp(H, F))
    prune(plain, tmp_path / "out", overwrite=True)
    left = files(tmp_path / "out").keys()
    assert left & CARRIED.keys() == {"tokenizer.json"}
    assert "mine.pt" in left
    verify(tmp_path / "out", against=plain)


def test_a_file_with_the_name_of_a_written_one_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(llama_config(H, F)))
    torch.save(mlp(H, F), source / "pytorch_odd.bin")
    index = {"metadata": {}, "weight_map": dict.fromkeys(mlp(H, F), "pytorch_odd.bin")}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (source / "odd.safetensors").write_bytes(b"an adapter")
    message = refusal(source, tmp_path / "out")
    assert message.startswith("odd.safetensors: has the name of a file of the pruned model")


def test_a_link_out_of_the_folder_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"private")
    (source / "value_head.safetensors").symlink_to(tmp_path / "secret")
    assert "value_head.safetensors: is a link to" in refusal(source, tmp_path / "out")
