"""Several processes prune one checkpoint together, and write what one alone would."""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from emp_cli.app import app
from support.checkpoints import (
    F,
    H,
    Tensors,
    few_values,
    files,
    kept_unfinished,
    llama_config,
    visible,
    write_checkpoint,
)
from support.processes import Process, free_port, rank_environment, start
from support.tuned import tune
from typer.testing import CliRunner

from emp_llm import PruneOptions, prune
from emp_llm.output.output_folder import STAGING_NAME
from emp_llm.runtime.launcher import Meeting, meeting_of
from emp_llm.runtime.ranks import join_team

SHARDS = [f"model-0000{number}-of-00004.safetensors" for number in (1, 2, 3, 4)]


def mixed_layer(number: int) -> Tensors:
    """A layer of three formats, whose weights are few values, so that many are equal."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    leaves = {"down": (H, F), "gate": (F, H), "up": (F, H)}
    return {
        f"model.layers.{number}.mlp.{leaf}_proj.weight": few_values(*shape).to(dtype)
        for (leaf, shape), dtype in zip(leaves.items(), dtypes, strict=True)
    }


@pytest.fixture
def four(tmp_path: Path) -> Path:
    """A checkpoint of four shards."""
    shards = [mixed_layer(number) for number in range(4)]
    return write_checkpoint(tmp_path / "four", llama_config(H, F, layers=4), *shards)


def take_part(
    source: Path, out: Path, options: PruneOptions, error_file: Path, folder: str
) -> None:
    """Prune as one rank, from a folder; what it fails with goes to a file."""
    os.chdir(folder)
    try:
        prune(source, out, options, distributed=True)
    except Exception as error:
        error_file.write_text(f"{type(error).__name__}: {error}")
        raise


Together = Callable[..., list[Process]]


@pytest.fixture
def together(four: Path, tmp_path: Path) -> Together:
    """Start ranks, which prune the checkpoint to `out`; each writes its error to `errors/RANK`."""
    (tmp_path / "errors").mkdir()

    def run(
        size: int,
        options: PruneOptions | None = None,
        out: Path | None = None,
        killed: tuple[int, int] = (-1, 0),
        folders: tuple[Path, ...] = (),
        works: Mapping[int, Callable[..., None]] | None = None,
        port: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> list[Process]:
        port = port or free_port()
        return [
            start(
                (works or {}).get(rank, take_part),
                four,
                out or tmp_path / "out",
                options,
                tmp_path / "errors" / str(rank),
                str(folders[rank] if folders else tmp_path),
                environment=rank_environment(rank, size, port) | dict(environment or {}),
                killed_at=killed[1] if rank == killed[0] else None,
            )
            for rank in range(size)
        ]

    return run


def statuses(processes: list[Process]) -> list[int | None]:
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize(
    ("granularity", "size"),
    [
        ("row", 3),
        ("layer", 2),
        ("model", 6),
        *(pytest.param("row", size, marks=pytest.mark.slow) for size in (1, 6)),
        *(pytest.param("layer", size, marks=pytest.mark.slow) for size in (1, 4)),
        *(pytest.param("model", size, marks=pytest.mark.slow) for size in (2, 3)),
    ],
)
def test_any_number_of_ranks_writes_the_same_bytes(
    four: Path, tmp_path: Path, together: Together, granularity: str, size: int
) -> None:
    options = PruneOptions(granularity=granularity, beta=0.9)
    prune(four, tmp_path / "alone", options)
    assert statuses(together(size, options)) == [0] * size
    assert files(tmp_path / "out") == files(tmp_path / "alone")


def take_part_less_base(
    source: Path, out: Path, _options: None, error_file: Path, folder: str
) -> None:
    """Prune the differences to the source as one rank."""
    tuned = Path(folder) / "tuned"
    try:
        prune(tuned, out, base=source, distributed=True)
    except Exception as error:
        error_file.write_text(f"{type(error).__name__}: {error}")
        raise


def test_two_ranks_write_the_same_delta(four: Path, tmp_path: Path, together: Together) -> None:
    tuned = tune(four, tmp_path / "tuned", changed="gate")
    prune(tuned, tmp_path / "alone", PruneOptions(), base=four)
    processes = together(2, works=dict.fromkeys((0, 1), take_part_less_base))
    assert statuses(processes) == [0, 0]
    assert files(tmp_path / "out") == files(tmp_path / "alone")


@pytest.mark.parametrize(("granularity", "size"), [("row", 3), ("layer", 2), ("model", 2)])
def test_any_number_of_ranks_finds_the_same_beta(
    four: Path, tmp_path: Path, together: Together, granularity: str, size: int
) -> None:
    options = PruneOptions(granularity=granularity, target_sparsity=0.42)
    prune(four, tmp_path / "alone", options)
    assert statuses(together(size, options)) == [0] * size
    assert files(tmp_path / "out") == files(tmp_path / "alone")


def work_on_a_gpu(source: Path, out: Path, options: PruneOptions, *_: object) -> None:
    prune(source, out, options, device="cuda", distributed=True)


def test_ranks_that_share_a_gpu_write_the_same_bytes(
    four: Path, tmp_path: Path, together: Together
) -> None:
    options = PruneOptions(targets=r"layers\.[01]\.mlp\.down")  # of two shards; few rows
    prune(four, tmp_path / "alone", options)
    assert statuses(together(2, options, works=dict.fromkeys(range(2), work_on_a_gpu))) == [0, 0]
    assert files(tmp_path / "out") == files(tmp_path / "alone")


@pytest.mark.parametrize(
    ("dead", "size", "step"),
    [
        (0, 2, 2),
        (1, 3, 5),
        *(pytest.param(0, 2, step, marks=pytest.mark.slow) for step in (0, 5)),
        *(pytest.param(1, 3, step, marks=pytest.mark.slow) for step in (0, 2)),
    ],
)
def test_a_rank_that_is_killed_makes_the_others_stop_and_fewer_go_on(
    four: Path, tmp_path: Path, together: Together, dead: int, size: int, step: int
) -> None:
    found = statuses(together(size, killed=(dead, step)))
    assert found == [-9 if rank == dead else 1 for rank in range(size)]
    assert visible(tmp_path / "out") == {}
    for rank in set(range(size)) - {dead}:
        errors = (tmp_path / "errors" / str(rank)).read_text()
        assert errors.startswith("RankError: rank ")
        assert errors.endswith("machine: run the command again; all ranks stopped")
        assert "\n" not in errors
    assert statuses(together(2)) == [0, 0]
    prune(four, tmp_path / "alone")
    assert files(tmp_path / "out") == files(tmp_path / "alone")


def test_a_rank_that_fails_makes_the_others_stop_with_its_reason(
    four: Path, tmp_path: Path, together: Together
) -> None:
    content = bytearray((four / SHARDS[2]).read_bytes())
    content[-2:] = b"\xff\x7f"  # a NaN in the last of its weights
    (four / SHARDS[2]).write_bytes(content)
    assert statuses(together(4)) == [1] * 4
    errors = sorted((tmp_path / "errors" / str(rank)).read_text() for rank in range(4))
    reason = f"{SHARDS[2]}: 'model.layers.2.mlp.gate_proj.weight' row {F - 1} holds NaN or infinity"
    assert errors[0].startswith(f"CheckpointError: {reason}")
    for line in errors[1:]:
        assert line.startswith("RankError: rank ")
        assert f" failed: {reason}" in line
    assert not (tmp_path / "out").exists()  # for the same command would fail again


def fill_disk(*arguments: object) -> None:
    """Take part as a rank whose disk is full."""

    def full(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.pwrite = full
    take_part(*arguments)  # type: ignore[arg-type]


def test_a_rank_whose_disk_is_full_tells_so_like_one_process_and_work_is_kept(
    four: Path, tmp_path: Path, together: Together
) -> None:
    assert statuses(together(2, works={1: fill_disk})) == [1, 1]
    errors = [(tmp_path / "errors" / str(rank)).read_text() for rank in range(2)]
    assert errors[0].startswith("RankError: rank 1 of 2 ")
    assert " failed: [Errno 28] No space left on device" in errors[0]
    assert errors[1].startswith(f"OutputError: {tmp_path / 'out'}: the disk is full (")
    assert visible(tmp_path / "out") == {}
    kept_unfinished(tmp_path / "out")  # asserts that nothing else is there
    assert statuses(together(2)) == [0, 0]
    prune(four, tmp_path / "alone")
    assert files(tmp_path / "out") == files(tmp_path / "alone")


def tell_much() -> None:
    """Take part as one of two ranks that tell each other more than the store takes at a time."""
    with join_team(meeting_of(os.environ)) as team:
        assert team.share(lambda: "ü" * 5_000_000) == "ü" * 5_000_000
        assert team.gather([team.rank] * 3_000_000) == [[0] * 3_000_000, [1] * 3_000_000]


def test_ranks_tell_each_other_of_as_many_tensors_as_there_are() -> None:
    port = free_port()
    environments = [rank_environment(rank, 2, port) for rank in range(2)]
    assert statuses([start(tell_much, environment=e) for e in environments]) == [0, 0]


def push_without_token(source: Path, out: Path, _options: object, error_file: Path, _: str) -> None:
    """Take part as a rank of the command line, which is to push and has no token."""
    arguments = ["prune", str(source), "--out", str(out), "--push-to-hub", "someone/model"]
    result = CliRunner().invoke(app, arguments)
    error_file.write_text(result.stderr)
    sys.exit(result.exit_code)


def test_a_missing_token_is_told_to_all_ranks_before_they_work(
    tmp_path: Path, together: Together
) -> None:
    environment = {"HF_HOME": str(tmp_path / "nothing"), "HF_TOKEN": ""}
    works = dict.fromkeys(range(2), push_without_token)
    assert statuses(together(2, works=works, environment=environment)) == [1, 1]
    errors = [(tmp_path / "errors" / str(rank)).read_text() for rank in range(2)]
    assert errors[0].startswith("HubError: someone/model: there is no token")
    assert errors[1].startswith("RankError: rank 0 of 2 ")
    assert " failed: someone/model: there is no token" in errors[1]
    assert not (tmp_path / "out").exists()


def prune_twice(source: Path, out: Path, *_arguments: object) -> None:
    """Prune as one rank, and then once more with other options."""
    prune(source, out, distributed=True)
    prune(source, out.with_name("second"), PruneOptions(beta=0.5), distributed=True)


@pytest.mark.parametrize("launcher", [False, True])
def test_the_same_ranks_prune_again_with_other_options(
    four: Path, tmp_path: Path, together: Together, launcher: bool
) -> None:
    """With torchrun, which holds the store of both runs, and without, where rank 0 does."""
    port, environment = free_port(), {}
    if launcher:
        store = torch.distributed.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False
        )
        environment = {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    works = dict.fromkeys(range(2), prune_twice)
    assert statuses(together(2, works=works, port=port, environment=environment)) == [0, 0]
    prune(four, tmp_path / "alone", PruneOptions(beta=0.5))
    assert files(tmp_path / "second") == files(tmp_path / "alone")
    if launcher:
        del store


def interrupt_soon(*arguments: object) -> None:
    """Take part as a rank that is interrupted while it waits for others."""
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        take_part(*arguments)  # type: ignore[arg-type]
    except KeyboardInterrupt:
        os._exit(130)


def idle(*_arguments: object) -> None:
    """A rank that never comes."""


def test_a_rank_that_waits_for_others_can_be_interrupted(together: Together) -> None:
    (first, second) = together(2, works={0: interrupt_soon, 1: idle})
    assert statuses([first, second]) == [130, 0]


def test_ranks_that_do_not_share_the_folder_are_told(tmp_path: Path, together: Together) -> None:
    homes = (tmp_path / "a", tmp_path / "b")
    for home in homes:
        home.mkdir()
    assert statuses(together(2, out=Path("out"), folders=homes)) == [1, 1]
    errors = (tmp_path / "errors" / "1").read_text()
    assert errors.startswith(
        "OutputError: out: rank 1 does not see what rank 0 wrote there: give a"
    )
    assert list((tmp_path / "b").iterdir()) == []


def test_ranks_check_what_is_finished_together_and_make_again_what_is_damaged(
    four: Path, tmp_path: Path, together: Together
) -> None:
    out = tmp_path / "out"
    assert -9 in statuses(together(2, killed=(1, 8)))
    staged = out / STAGING_NAME
    finished = sorted(path.name for path in staged.glob("*.safetensors"))
    assert finished != []
    content = bytearray((staged / finished[0]).read_bytes())
    content[-1] ^= 1
    (staged / finished[0]).write_bytes(content)
    assert statuses(together(3)) == [0] * 3
    prune(four, tmp_path / "alone")
    assert files(out) == files(tmp_path / "alone")


def test_a_folder_that_is_not_empty_is_told_by_all_ranks(
    tmp_path: Path, together: Together
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert statuses(together(2)) == [1, 1]
    errors = [(tmp_path / "errors" / str(rank)).read_text() for rank in range(2)]
    assert errors[0].startswith("OutputError: ")
    assert "is not empty (thesis.txt, …)" in errors[0]
    assert errors[0].removeprefix("OutputError: ") in errors[1]
    assert files(tmp_path / "out") == {"thesis.txt": b"mine"}


TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "node[07-09,12],other1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1(x2)",
    "SLURM_JOB_ID": "31234",
}


@pytest.mark.parametrize(
    ("environment", "meeting"),
    [
        ({}, None),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        (TORCHRUN, Meeting(2, 4, 2, None)),
        (SRUN, Meeting(5, 8, 2, "tcp://node07:21234")),
        (SRUN | {"MASTER_ADDR": "here", "MASTER_PORT": "5"}, Meeting(5, 8, 2, "tcp://here:5")),
        (SRUN | {"SLURM_STEP_NODELIST": "gpu-3"}, Meeting(5, 8, 2, "tcp://gpu-3:21234")),
        (SRUN | {"SLURM_STEP_NODELIST": "a-1,b[2-3]"}, Meeting(5, 8, 2, "tcp://a-1:21234")),
        (SRUN | TORCHRUN, Meeting(2, 4, 2, None)),
    ],
)
def test_who_takes_part_is_read_from_the_environment(
    environment: dict[str, str], meeting: Meeting | None
) -> None:
    assert meeting_of(environment) == meeting


def test_the_script_that_sbatch_runs_is_not_taken_for_one_of_its_tasks() -> None:
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "31234"}
    assert meeting_of(batch) is None
