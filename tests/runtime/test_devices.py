"""Which GPUs a run works on: those that were asked for, its share of them, or none."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from emp_cli.app import app
from emp_kernels.errors import NoDeviceError
from emp_kernels.rows import Workspace
from support.arriving import wait_for
from support.checkpoints import F, H, files, kept_unfinished
from typer.testing import CliRunner

from emp_llm import OptionError, PruneOptions, prune, unpack
from emp_llm.errors import DeviceError
from emp_llm.output.output_folder import STAGING_NAME
from emp_llm.runtime import devices, gpu_gain
from emp_llm.runtime.devices import Devices, asked_devices, check_device, share_of
from emp_llm.runtime.devices import worthwhile_devices as worthwhile
from emp_llm.runtime.gpu_gain import Work, seconds_saved
from emp_llm.runtime.pipeline import Piece, run_pieces, thread_count
from emp_llm.runtime.team import Team

TWO = [torch.device("cpu", 0), torch.device("cpu", 1)]
"""Stand for two GPUs: where there are none, Triton's interpreter works on the CPU."""

LARGE = Work(kernel="pack", nbytes=10**15, cores=1)
"""Hours of work for one core."""

Find = Callable[..., list[torch.device]]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[[Find], None]:
    """Has the driver see a GPU, Triton compile for it, and a function find the devices, empty."""

    def has(find: Find) -> None:
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (80 << 30, 80 << 30))
        monkeypatch.setattr(devices, "_driver_has_gpu", lambda: True)
        monkeypatch.setattr("emp_kernels.gpu_devices.interpreted", lambda: False)
        monkeypatch.setattr("emp_kernels.gpu_devices.find_devices", find)
        monkeypatch.setattr(devices, "pack_rows", lambda *_, **__: None)

    return has


def refuse(*_: object, **__: object) -> Any:
    raise AssertionError("not to be asked")


@pytest.mark.parametrize(
    ("kernel", "simd", "cores", "processes", "expected"),
    [
        # 2 cores at 1/(1/2.1 + 1/6) = 1.5556 GB/s against the disks' 5: 100/3.1111 - 100/5
        ("pack", True, 2, 1, 12.142857),
        # 1/(1/0.84 + 1/6) = 0.736842: 100/1.473684 - 100/5
        ("pack", False, 2, 1, 47.857143),
        ("pack", False, 8, 1, 0.0),  # 8 cores are as fast as the disks
        ("pack", False, 2, 4, 0.0),  # and so are 2, of disks that four processes share
        # 1/(1/0.97 + 1/6) = 0.835007
        ("prune", False, 1, 1, 99.759450),
        # 1/(1/2.5 + 1/6) = 1.764706
        ("unpack", True, 1, 1, 36.666667),
        ("unpack", False, 6, 1, 0.0),
    ],
)
def test_what_a_gpu_saves_is_what_the_cores_take_longer_than_the_disks(
    monkeypatch: pytest.MonkeyPatch,
    kernel: Any,
    simd: bool,
    cores: int,
    processes: int,
    expected: float,
) -> None:
    monkeypatch.setattr(gpu_gain, "resolve", lambda _: "simd" if simd else "scalar")
    work = Work(kernel=kernel, nbytes=10**11, cores=cores, processes=processes)
    assert seconds_saved(work) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("gigabytes", "taken"), [(31, False), (32, True)])
def test_auto_takes_gpus_where_half_as_much_again_as_the_start_up_is_saved(
    monkeypatch: pytest.MonkeyPatch,
    machine: Callable[[Find], None],
    gigabytes: int,
    taken: bool,
) -> None:
    machine(lambda: TWO)
    monkeypatch.setattr(gpu_gain, "resolve", lambda _: "scalar")
    # 0.478571 s a GB, see above: 14.8 s of 31 GB, 15.3 s of 32
    work = Work(kernel="pack", nbytes=gigabytes * 10**9, cores=2)
    assert worthwhile(work, Team()).gpus == (tuple(TWO) if taken else ())


def test_auto_asks_for_no_gpu_where_there_is_little_to_do(
    monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "_driver_has_gpu", refuse)
    prune(source, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "dense")


def test_auto_does_not_ask_torch_where_the_driver_has_no_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "_driver_has_gpu", lambda: False)
    monkeypatch.setattr("emp_kernels.gpu_devices.find_devices", refuse)
    assert worthwhile(LARGE, Team()).gpus == ()


def test_auto_stays_on_the_cpu_where_triton_only_interprets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(devices, "_driver_has_gpu", lambda: True)
    monkeypatch.setattr("emp_kernels.gpu_devices.interpreted", lambda: True)
    assert worthwhile(LARGE, Team()).gpus == ()


def test_auto_stays_on_the_cpu_where_something_lacks_for_the_gpu(
    monkeypatch: pytest.MonkeyPatch, machine: Callable[[Find], None]
) -> None:
    def find() -> list[torch.device]:
        raise NoDeviceError("no Triton")

    machine(find)
    assert worthwhile(LARGE, Team()).gpus == ()
    machine(lambda: TWO)

    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(devices, "pack_rows", no_compiler)
    assert worthwhile(LARGE, Team()).gpus == ()


def test_auto_leaves_gpus_alone_that_others_fill_or_have_to_themselves(
    monkeypatch: pytest.MonkeyPatch, machine: Callable[[Find], None]
) -> None:
    machine(lambda: TWO)
    monkeypatch.setattr(
        "torch.cuda.mem_get_info", lambda gpu: ((3 << 30) + (gpu.index << 30), 80 << 30)
    )
    assert worthwhile(LARGE, Team()).gpus == (TWO[1],)

    def busy(_gpu: torch.device) -> tuple[int, int]:
        raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")

    monkeypatch.setattr("torch.cuda.mem_get_info", busy)
    assert worthwhile(LARGE, Team()).gpus == ()


def told_work(monkeypatch: pytest.MonkeyPatch, module: str) -> list[Work]:
    """What `worthwhile_devices` is asked of from now on; it says the CPU."""
    told: list[Work] = []

    def note(work: Work, _team: Team) -> Devices:
        told.append(work)
        return Devices()

    monkeypatch.setattr(f"emp_llm.{module}.worthwhile_devices", note)
    return told


def test_auto_is_decided_by_the_bytes_of_the_targets(
    monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path
) -> None:
    told = told_work(monkeypatch, "runtime.workers")
    prune(source, tmp_path / "packed", threads=1)
    prune(source, tmp_path / "dense", PruneOptions(output_format="dense"), threads=1)
    nbytes = 3 * H * F * 2
    assert told == [Work(kernel=kernel, nbytes=nbytes, cores=1) for kernel in ("pack", "prune")]


def test_what_is_still_to_be_downloaded_is_not_worth_a_gpu(
    monkeypatch: pytest.MonkeyPatch, model: str, tmp_path: Path
) -> None:
    told = told_work(monkeypatch, "runtime.workers")
    prune(model, tmp_path / "out")
    assert [work.nbytes for work in told] == [0]


@pytest.mark.parametrize(
    ("seen", "shares"),
    [
        (["abc"], [[0, 1, 2]]),
        (["ab", "ab"], [[0], [1]]),
        (["abcde", "abcde"], [[0, 2, 4], [1, 3]]),
        (["a", "a", "a"], [[0], [0], [0]]),
        (["ab", "ab", "ab"], [[0], [1], [0]]),
        (["a", "b"], [[0], [0]]),  # CUDA_VISIBLE_DEVICES gave each its own
        (["ab", "cd", "ab", "cd"], [[0], [0], [1], [1]]),  # two machines
        (["", "ab", ""], [[], [0, 1], []]),
    ],
)
def test_ranks_that_see_the_same_gpus_share_them(seen: list[str], shares: list[list[int]]) -> None:
    assert [share_of(seen, rank) for rank in range(len(seen))] == shares


class Second(Team):
    """The second of two ranks on one machine."""

    rank = 1
    size = local_size = 2

    def gather(self, value: Any) -> list[Any]:
        return [value, value]


def test_a_rank_works_on_its_share_of_the_gpus(machine: Callable[[Find], None]) -> None:
    machine(lambda _asked="cuda": TWO)
    assert asked_devices("cuda", Second()) == Devices((TWO[1],))
    assert asked_devices("cuda", Team()) == Devices(tuple(TWO))
    assert worthwhile(LARGE, Second()) == Devices((TWO[1],))


def test_cpu_and_auto_ask_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emp_kernels.gpu_devices.find_devices", refuse)
    monkeypatch.setattr("emp_kernels.gpu_devices.visible_gpus", refuse)
    assert asked_devices("cpu", Team()) == Devices()
    assert asked_devices("auto", Team()) is None
    check_device("cpu")
    check_device("auto")


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


def name_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have two GPUs be found, in whose name the CPU's kernels work."""
    monkeypatch.setattr(devices, "_ready", lambda found: found)
    monkeypatch.setattr("emp_kernels.gpu_devices.find_devices", lambda _asked: TWO)
    monkeypatch.setattr(Devices, "workspace", lambda _self, _thread: Workspace())


def test_progress_tells_which_gpus_work(
    monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path
) -> None:
    assert Devices((torch.device("cuda", 1),)).told == " on cuda:1"
    assert Devices((torch.device("cpu"),)).told == " in Triton's interpreter"
    name_gpus(monkeypatch)
    out = ["--out", str(tmp_path / "out"), "--device", "cuda"]
    told = CliRunner().invoke(app, ["prune", str(source), *out]).stderr
    assert told.splitlines()[0].startswith("pruning on 2 GPUs ")
    out = ["--out", str(tmp_path / "cpu"), "--device", "cpu"]
    told = CliRunner().invoke(app, ["prune", str(source), *out]).stderr
    assert told.splitlines()[0].startswith("pruning 1")


def see_gpus(monkeypatch: pytest.MonkeyPatch, count: int, cuda: str | None = "13.0") -> None:
    """Have torch see so many GPUs, and Triton compile."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setattr("torch.cuda.init", lambda: None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (7, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Tesla V100")


@pytest.mark.parametrize(
    ("device", "count", "cuda", "reason"),
    [
        ("cuda", 0, None, f"torch {torch.__version__} is built without CUDA"),
        ("cuda:0", 0, "13.0", f"torch {torch.__version__} finds no GPU, or no driver of one"),
        (
            "cuda:2",
            2,
            "13.0",
            f"torch {torch.__version__} sees no more than 2 GPUs, from cuda:0 on",
        ),
        ("cuda", 1, None, f"torch {torch.__version__} is not built for CUDA, as the kernels are"),
        (
            "cuda:1",
            2,
            "13.0",
            "cuda:1 is a Tesla V100 of compute capability 7.0; the kernels need 8.0 or more",
        ),
    ],
)
@pytest.mark.parametrize("command", ["prune", "unpack"])
def test_a_device_that_is_not_there_is_told_in_one_line_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    command: str,
    device: str,
    count: int,
    cuda: str | None,
    reason: str,
) -> None:
    see_gpus(monkeypatch, count, cuda)
    assert refusal_of(command, device, tmp_path) == (
        f"OptionError: device is '{device}'; {reason}: choose auto or cpu\n"
    )


def refusal_of(command: str, device: str, folder: Path) -> str:
    """What a command says of a device; that its model is not there it has not noticed."""
    arguments = [command, "no/such/model", "--out", str(folder / "out"), "--device", device]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert (result.exit_code, result.stdout) == (1, "")
    assert list(folder.iterdir()) == []
    return result.stderr


def test_a_driver_that_torch_cannot_use_is_told_in_one_line_and_auto_takes_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def too_old() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12040).\nX")

    see_gpus(monkeypatch, 1)
    monkeypatch.setattr("torch.cuda.init", too_old)
    monkeypatch.setattr(devices, "_driver_has_gpu", lambda: True)
    assert refusal_of("prune", "cuda", tmp_path) == (
        f"OptionError: device is 'cuda'; torch {torch.__version__} cannot use the GPU (The NVIDIA "
        "driver on your system is too old (found version 12040).): choose auto or cpu\n"
    )
    assert worthwhile(LARGE, Team()).gpus == ()


def test_without_triton_it_is_told_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    see_gpus(monkeypatch, 1)
    assert refusal_of("prune", "cuda", tmp_path) == (
        "OptionError: device is 'cuda'; the kernels for GPUs need Triton, which is not installed "
        "(pip install triton): choose auto or cpu\n"
    )
    see_gpus(monkeypatch, 0, cuda=None)  # then Triton alone would not do
    assert "is built without CUDA" in refusal_of("prune", "cuda", tmp_path)


def test_a_triton_that_is_too_old_is_told_with_the_torch_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("triton.__version__", "3.3.1")
    see_gpus(monkeypatch, 1)
    assert refusal_of("prune", "cuda", tmp_path) == (
        "OptionError: device is 'cuda'; the kernels for GPUs need Triton 3.4, which comes with "
        "torch 2.8; this is Triton 3.3.1: choose auto or cpu\n"
    )


def test_without_triton_torch_may_use_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    see_gpus(monkeypatch, 1)
    check_device("cuda:0")
    with pytest.raises(OptionError, match=r"^device is 'cuda:1'; torch .* no more than 1 GPUs"):
        check_device("cuda:1")


def test_kernels_that_do_not_run_are_told_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, machine: Callable[[Find], None], tmp_path: Path
) -> None:
    machine(lambda _asked: TWO)

    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler\nPlease specify via CC")

    monkeypatch.setattr(devices, "pack_rows", no_compiler)
    assert refusal_of("prune", "cuda", tmp_path) == (
        "OptionError: device is 'cuda'; the kernels do not run on cpu:0 (Failed to find C "
        "compiler): choose auto or cpu\n"
    )


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cuda:one", "CUDA", ""])
def test_a_device_that_cannot_be_is_refused(device: str, tmp_path: Path) -> None:
    assert refusal_of("prune", device, tmp_path) == (
        f"OptionError: device is '{device}'; choose one of auto, cpu, cuda and cuda:N\n"
    )


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
        "cpu:0: has no room for the blocks of its threads (CUDA out of memory. Tried to allocate "
        "16.00 MiB.): end what else runs on it, give fewer --threads, or --device cpu"
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
