"""What the threads of a run do on its GPUs, and what is said when one has no room."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from emp_cli.app import app
from emp_kernels.rows import Workspace
from support.arriving import wait_for
from support.checkpoints import files, kept_unfinished
from support.gpus import TWO, name_gpus
from typer.testing import CliRunner

from emp_llm import prune
from emp_llm.errors import DeviceError
from emp_llm.output.output_folder import STAGING_NAME
from emp_llm.runtime.devices import Devices
from emp_llm.runtime.pipeline import Piece, run_pieces, thread_count


@pytest.mark.parametrize(
    ("cores", "processes", "gpus", "expected"),
    [
        *((2, 1, 0, 2), (2, 4, 0, 1), (2, 1, 1, 3), (4, 2, 1, 3), (6, 1, 1, 6), (64, 1, 1, 8)),
        *((64, 1, 4, 32), (16, 1, 4, 16), (8, 1, 4, 12)),
    ],
)
def test_there_are_three_to_eight_threads_for_each_gpu(
    monkeypatch: pytest.MonkeyPatch, cores: int, processes: int, gpus: int, expected: int
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    assert thread_count(None, processes, gpus) == expected
    assert thread_count(1, processes, gpus) == 1


def test_threads_work_on_the_gpus_in_turn() -> None:
    both = threading.Barrier(4, timeout=30)
    found: list[torch.device | None] = []

    def compute(workspace: Workspace) -> torch.device | None:
        both.wait()  # each of four threads has a piece
        return workspace.device

    pieces = [Piece(0, compute, found.append) for _ in range(4)]
    run_pieces(pieces, threads=4, devices=Devices(tuple(TWO)))
    assert sorted(str(device) for device in found) == ["cpu:0", "cpu:0", "cpu:1", "cpu:1"]


def test_progress_tells_which_gpus_work(
    monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path
) -> None:
    assert Devices((torch.device("cuda", 1),)).where == " on cuda:1"
    assert Devices((torch.device("cpu"),)).where == " in Triton's interpreter"
    name_gpus(monkeypatch)
    out = ["--out", str(tmp_path / "out"), "--device", "cuda"]
    shown = CliRunner().invoke(app, ["prune", str(source), *out]).stderr
    assert shown.splitlines()[0].startswith("pruning on 2 GPUs ")
    out = ["--out", str(tmp_path / "cpu"), "--device", "cpu"]
    shown = CliRunner().invoke(app, ["prune", str(source), *out]).stderr
    assert shown.splitlines()[0].startswith("pruning 1")


def test_a_gpu_without_room_is_one_line_and_finished_shards_are_kept(
    monkeypatch: pytest.MonkeyPatch, sharded: Path, tmp_path: Path
) -> None:
    from emp_llm.pruning import pack_job

    pack, calls = pack_job.pack_rows, iter(range(99))
    first = "model-00001-of-00002.safetensors"
    noted = tmp_path / "out" / STAGING_NAME / ".finished" / f"{first}.json"

    def run_out(*arguments: Any, **others: Any) -> Any:
        if next(calls) == 1:  # the first block of the second shard
            assert wait_for(noted.is_file)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 MiB.\nMore")
        return pack(*arguments, **others)

    name_gpus(monkeypatch)
    monkeypatch.setattr(pack_job, "pack_rows", run_out)
    with pytest.raises(DeviceError) as caught:
        prune(sharded, tmp_path / "out", device="cuda", threads=1)
    assert str(caught.value) == (
        "cpu:0: has no room for its threads' row blocks (CUDA out of memory. Tried to allocate "
        "16.00 MiB.): end other programs on it, give fewer --threads, or --device cpu"
    )
    assert caught.value.__notes__ == [
        f"1 file is finished and kept in {tmp_path / 'out'}: the same command goes on from there"
    ]
    assert kept_unfinished(tmp_path / "out") == [first]
    prune(sharded, tmp_path / "out", device="cpu")
    prune(sharded, tmp_path / "expected")
    assert files(tmp_path / "out") == files(tmp_path / "expected")


@pytest.mark.parametrize("error", [ValueError("out of memory"), RuntimeError("illegal access")])
def test_an_error_that_is_not_foreseen_stays_what_it_is(error: BaseException) -> None:
    assert Devices(tuple(TWO)).explained(error, 0) is error
    assert Devices().explained(RuntimeError("out of memory"), 0).args == ("out of memory",)


def test_memory_that_cannot_be_pinned_is_explained_with_its_gpu() -> None:
    explained = Devices(tuple(TWO)).explained(RuntimeError("CUDA error: out of memory"), 3)
    assert isinstance(explained, DeviceError)
    assert str(explained).startswith("cpu:1: has no room")
