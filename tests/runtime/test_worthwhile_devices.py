"""Whether `auto` takes GPUs: where they save more than they cost, and there is room on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from emp_kernels.errors import NoDeviceError
from support.checkpoints import F, H
from support.gpus import LARGE, TWO, Find, refuse

from emp_llm import PruneOptions, prune, unpack
from emp_llm.runtime import device_choice, device_trial, gpu_gain
from emp_llm.runtime.device_choice import worthwhile_devices as worthwhile
from emp_llm.runtime.devices import Devices
from emp_llm.runtime.gpu_gain import Work, seconds_saved
from emp_llm.runtime.team import Team


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
    monkeypatch.setattr(device_choice, "_driver_has_gpu", refuse)
    prune(source, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "dense")


def test_auto_does_not_ask_torch_where_the_driver_has_no_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_choice, "_driver_has_gpu", lambda: False)
    monkeypatch.setattr("emp_kernels.gpu_devices.find_devices", refuse)
    assert worthwhile(LARGE, Team()).gpus == ()


def test_auto_stays_on_the_cpu_where_triton_only_interprets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device_choice, "_driver_has_gpu", lambda: True)
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

    monkeypatch.setattr(device_trial, "pack_rows", no_compiler)
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


def noted_work(monkeypatch: pytest.MonkeyPatch, module: str) -> list[Work]:
    """What `worthwhile_devices` is asked of from now on; it says the CPU."""
    noted: list[Work] = []

    def note(work: Work, _team: Team) -> Devices:
        noted.append(work)
        return Devices()

    monkeypatch.setattr(f"emp_llm.{module}.worthwhile_devices", note)
    return noted


def test_auto_is_decided_by_the_bytes_of_the_targets(
    monkeypatch: pytest.MonkeyPatch, source: Path, tmp_path: Path
) -> None:
    noted = noted_work(monkeypatch, "runtime.workers")
    prune(source, tmp_path / "packed", threads=1)
    prune(source, tmp_path / "dense", PruneOptions(output_format="dense"), threads=1)
    nbytes = 3 * H * F * 2
    assert noted == [Work(kernel=kernel, nbytes=nbytes, cores=1) for kernel in ("pack", "prune")]


def test_what_is_still_to_be_downloaded_is_not_worth_a_gpu(
    monkeypatch: pytest.MonkeyPatch, model: str, tmp_path: Path
) -> None:
    noted = noted_work(monkeypatch, "runtime.workers")
    prune(model, tmp_path / "out")
    assert [work.nbytes for work in noted] == [0]
