"""GPUs that are not there: what torch, the driver and Triton would say of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from emp_kernels.rows import Workspace

from emp_llm.runtime import device_choice
from emp_llm.runtime.devices import Devices
from emp_llm.runtime.gpu_gain import Work

TWO = [torch.device("cpu", 0), torch.device("cpu", 1)]
"""Stand for two GPUs: where there are none, Triton's interpreter works on the CPU."""

LARGE = Work(kernel="pack", nbytes=10**15, cores=1)
"""Hours of work for one core."""

Find = Callable[..., list[torch.device]]


def refuse(*_: object, **__: object) -> Any:
    raise AssertionError("not to be asked")


def name_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have two GPUs be found, in whose name the CPU's kernels work."""
    monkeypatch.setattr(device_choice, "tried", lambda found: found)
    monkeypatch.setattr("emp_kernels.gpu_devices.find_devices", lambda _asked: TWO)
    monkeypatch.setattr(Devices, "workspace", lambda _self, _thread: Workspace())


def see_gpus(monkeypatch: pytest.MonkeyPatch, count: int, cuda: str | None = "13.0") -> None:
    """Have torch see so many GPUs, and Triton compile."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr("torch.version.cuda", cuda)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    monkeypatch.setattr("torch.cuda.init", lambda: None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: (7, 0))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "Tesla V100")
