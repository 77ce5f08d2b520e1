"""Which GPUs a run works on: those that were asked for, its share of them, or an error."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from emp_cli.app import app
from support.gpus import LARGE, TWO, Find, refuse, see_gpus
from typer.testing import CliRunner

from emp_llm import OptionError
from emp_llm.runtime import device_choice, device_trial
from emp_llm.runtime.device_choice import asked_devices, check_device, share_of
from emp_llm.runtime.device_choice import worthwhile_devices as worthwhile
from emp_llm.runtime.devices import Devices
from emp_llm.runtime.team import Team


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
    monkeypatch.setattr(device_choice, "_driver_has_gpu", lambda: True)
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

    monkeypatch.setattr(device_trial, "pack_rows", no_compiler)
    assert refusal_of("prune", "cuda", tmp_path) == (
        "OptionError: device is 'cuda'; the kernels do not run on cpu:0 (Failed to find C "
        "compiler): choose auto or cpu\n"
    )


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:-1", "cuda:one", "CUDA", ""])
def test_a_device_that_cannot_be_is_refused(device: str, tmp_path: Path) -> None:
    assert refusal_of("prune", device, tmp_path) == (
        f"OptionError: device is '{device}'; choose one of auto, cpu, cuda and cuda:N\n"
    )
