"""Memory and streams of threads that work on GPUs, seen in what they ask of torch."""

import threading
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from emp_kernels.gpu_workspace import DeviceWorkspace

CPU = torch.device("cpu")
"""Stands for a GPU."""


def test_after_an_error_the_stream_is_waited_for_and_the_error_is_raised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.device", nullcontext)
    monkeypatch.setattr("torch.cuda.stream", nullcontext)
    waits: list[None] = []

    class Broken:
        def synchronize(self) -> None:
            waits.append(None)
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    workspace = DeviceWorkspace(CPU)
    workspace._stream = Broken()  # stands for that of a GPU
    with pytest.raises(KeyboardInterrupt), workspace.active():
        raise KeyboardInterrupt
    assert len(waits) == 1


@pytest.mark.parametrize("pinned", [True, False])
def test_what_is_not_pinned_goes_to_a_gpu_through_memory_that_is(
    monkeypatch: pytest.MonkeyPatch, pinned: bool
) -> None:
    """So that what is only there for the call may go while the copy is under way."""
    workspace = DeviceWorkspace(CPU)
    array = np.arange(5)
    read = array if pinned else workspace.take("numbers to upload", 40)
    workspace._stream = object()  # stands for that of a GPU
    monkeypatch.setattr("torch.Tensor.is_pinned", lambda _: pinned)
    copied: list[int] = []
    copy = torch.Tensor.copy_

    def noted(there: torch.Tensor, here: torch.Tensor, *, non_blocking: bool) -> torch.Tensor:
        copied.append(here.data_ptr())
        return copy(there, here, non_blocking=non_blocking)

    monkeypatch.setattr("torch.Tensor.copy_", noted)
    there = workspace.upload("numbers", array)
    assert there.view(torch.int64).tolist() == [0, 1, 2, 3, 4]
    assert copied == [read.ctypes.data]


def test_threads_compile_in_turn_and_then_work_at_the_same_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.device", nullcontext)
    monkeypatch.setattr("torch.cuda.stream", nullcontext)
    inside, together = threading.Lock(), threading.Barrier(2, timeout=30)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            workspace = DeviceWorkspace(CPU)
            workspace._stream = object()  # stands for that of a GPU
            with workspace.active():
                assert inside.acquire(blocking=False)
                threading.Event().wait(0.05)
                inside.release()
            with workspace.active():
                together.wait()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
