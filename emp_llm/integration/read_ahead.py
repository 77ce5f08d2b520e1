"""Tensors that are asked for one after the other, made by all cores a little ahead of that."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from emp_kernels.gpu_workspace import DeviceWorkspace
from emp_kernels.rows import Workspace

from emp_llm.integration.tensor_readers import DenseWeights, DeviceWeights, Source
from emp_llm.tensors.geometry import RowBlock

__all__ = ["Job", "MadeElsewhere", "ReadAhead", "Reading"]

AHEAD_BYTES = 128 << 20
"""Weights that are made before they are asked for, at most, but for one tensor."""

_this_thread = threading.local()


class Job(Protocol):
    """Something that makes a tensor.

    Attributes:
        nbytes: The tensor's size, to limit what is made ahead.
    """

    nbytes: int

    def begin(self, pool: ThreadPoolExecutor) -> None:
        """Give the work to the pool."""

    def result(self) -> torch.Tensor:
        """Wait for the tensor, and forget it."""


class Reading:
    """Reads a source into memory, its blocks on several threads.

    Args:
        source: The tensor.
        device: The GPU whose memory that is, and whose kernels make the weights; None for the CPU.
    """

    def __init__(self, source: Source, device: torch.device | None = None) -> None:
        self.nbytes = source.geometry.nbytes
        self._source = source
        self._device = device
        self._weights: DenseWeights | DeviceWeights | None = None
        self._parts: list[Future[None]] = []

    def begin(self, pool: ThreadPoolExecutor) -> None:
        """Give the blocks to the pool."""
        geometry = self._source.geometry
        weights = self._weights = (
            DenseWeights.empty(geometry)
            if self._device is None
            else DeviceWeights(geometry, self._device)
        )
        self._parts = [
            pool.submit(self._fill, weights, block) for block in self._source.row_blocks()
        ]

    def _fill(self, weights: DenseWeights | DeviceWeights, block: RowBlock) -> None:
        if isinstance(weights, DenseWeights):
            self._source.fill(weights, block, _workspace())
        else:
            self._source.fill_there(weights, block, _device_workspace(weights.tensor.device))

    def result(self) -> torch.Tensor:
        """The tensor, once all blocks are there."""
        assert self._weights is not None  # noqa: S101 (it was begun)
        for part in self._parts:
            part.result()
        tensor, self._weights, self._parts = self._weights.tensor, None, []
        return tensor


class MadeElsewhere:
    """Calls a function that makes the tensor."""

    def __init__(self, function: Callable[[], torch.Tensor], nbytes: int) -> None:
        self.nbytes = nbytes
        self._function = function
        self._future: Future[torch.Tensor] | None = None

    def begin(self, pool: ThreadPoolExecutor) -> None:
        """Give the call to the pool."""
        self._future = pool.submit(self._function)

    def result(self) -> torch.Tensor:
        """What the function returned."""
        assert self._future is not None  # noqa: S101 (it was begun)
        future, self._future = self._future, None
        return future.result()


class ReadAhead:
    """Makes tensors ahead of their use, a bounded number of bytes.

    Args:
        threads: How many threads make them.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="emp")
        self._groups: dict[str, dict[str, list[Job]]] = {}
        self._waiting: dict[int, Job] = {}
        self._ahead = 0

    def add(self, job: Job, target: str, source: str) -> None:
        """Announce a tensor.

        Tensors are asked for by target, then by source, then as announced; the order of targets
        and sources is that of their first tensor.
        """
        self._groups.setdefault(target, {}).setdefault(source, []).append(job)

    def take(self, job: Job) -> torch.Tensor:
        """The tensor of a job that was announced, once; all others have been announced too."""
        for group in self._groups.values():
            self._waiting.update((id(job), job) for jobs in group.values() for job in jobs)
        self._groups.clear()
        if id(job) in self._waiting:
            self._begin(self._waiting.pop(id(job)))
        while self._waiting and self._ahead < AHEAD_BYTES:
            self._begin(self._waiting.pop(next(iter(self._waiting))))
        tensor = job.result()
        self._ahead -= job.nbytes
        return tensor

    def _begin(self, job: Job) -> None:
        self._ahead += job.nbytes
        job.begin(self._pool)

    def close(self) -> None:
        """End the threads; what they have not begun is dropped."""
        self._pool.shutdown(cancel_futures=True)


def _device_workspace(device: torch.device) -> DeviceWorkspace:
    if not hasattr(_this_thread, "on_devices"):
        _this_thread.on_devices = {}
    workspaces: dict[torch.device, DeviceWorkspace] = _this_thread.on_devices
    if device not in workspaces:
        workspaces[device] = DeviceWorkspace(device)
    return workspaces[device]


def _workspace() -> Workspace:
    if not hasattr(_this_thread, "workspace"):
        _this_thread.workspace = Workspace()
    workspace: Workspace = _this_thread.workspace
    return workspace
