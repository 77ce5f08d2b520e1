"""Reads tensors ahead, on all cores, in the order in which they are asked for."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from emp_kernels.gpu_workspace import DeviceWorkspace
from emp_kernels.rows import Workspace

from emp_llm.loading.tensor_readers import DeviceWeights, TensorReader, UnpackingReader
from emp_llm.resident.content import Content
from emp_llm.resident.dense_weights import DenseWeights
from emp_llm.resident.weight import PackedWeight
from emp_llm.tensors.geometry import RowBlock

__all__ = ["Holding", "Job", "MadeElsewhere", "ReadAhead", "Reading"]

AHEAD_BYTES = 128 << 20
"""Limit of the weights that are made before they are asked for; one tensor may exceed it."""

_this_thread = threading.local()


class Job(Protocol):
    """Something that makes a tensor.

    Attributes:
        nbytes: The tensor's size, which counts towards the limit.
    """

    nbytes: int

    def begin(self, pool: ThreadPoolExecutor) -> Callable[[], torch.Tensor]:
        """Give the work to the pool; returns what waits for the tensor."""


class Reading:
    """Reads a tensor into memory, its row blocks on several threads.

    Args:
        reader: Reads the tensor.
        device: The GPU that the tensor is read to and whose kernels do the work; None for the CPU.
    """

    def __init__(self, reader: TensorReader, device: torch.device | None = None) -> None:
        self.nbytes = reader.geometry.nbytes
        self._reader = reader
        self._device = device

    def begin(self, pool: ThreadPoolExecutor) -> Callable[[], torch.Tensor]:
        """Give the row blocks to the pool."""
        geometry = self._reader.geometry
        weights = (
            DenseWeights.empty(geometry)
            if self._device is None
            else DeviceWeights(geometry, self._device)
        )
        parts = [pool.submit(self._fill, weights, block) for block in self._reader.row_blocks()]

        def wait() -> torch.Tensor:
            for part in parts:
                part.result()
            return weights.tensor

        return wait

    def _fill(self, weights: DenseWeights | DeviceWeights, block: RowBlock) -> None:
        if isinstance(weights, DenseWeights):
            self._reader.fill(weights, block, _workspace())
        else:
            self._reader.fill_there(weights, block, _device_workspace(weights.tensor.device))


class Holding:
    """Reads a packed tensor and keeps it packed.

    Args:
        reader: Reads the tensor.
    """

    def __init__(self, reader: UnpackingReader) -> None:
        self.nbytes = reader.packed_bytes
        self._reader = reader

    def begin(self, pool: ThreadPoolExecutor) -> Callable[[], torch.Tensor]:
        """Give the tensor to the pool."""
        planes = pool.submit(self._reader.hold)
        return lambda: PackedWeight(Content.of(planes.result()))


class MadeElsewhere:
    """Calls a function that makes the tensor."""

    def __init__(self, function: Callable[[], torch.Tensor], nbytes: int) -> None:
        self.nbytes = nbytes
        self._function = function

    def begin(self, pool: ThreadPoolExecutor) -> Callable[[], torch.Tensor]:
        """Give the call to the pool."""
        return pool.submit(self._function).result


class ReadAhead:
    """Makes tensors ahead of their use, up to a limit of bytes.

    Args:
        threads: How many threads make them.
    """

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="emp")
        self._groups: dict[str, dict[str, list[Job]]] = {}
        self._waiting: dict[int, Job] = {}
        self._begun: dict[int, Callable[[], torch.Tensor]] = {}
        self._ahead = 0

    def add(self, job: Job, target: str, source: str) -> None:
        """Announce a tensor.

        Tensors are asked for by target, then by source, then as announced; the order of targets
        and sources is that of their first tensor.
        """
        self._groups.setdefault(target, {}).setdefault(source, []).append(job)

    def take(self, job: Job) -> torch.Tensor:
        """The tensor of a job, which may be taken once; call it when all jobs have been added."""
        for group in self._groups.values():
            self._waiting.update((id(job), job) for jobs in group.values() for job in jobs)
        self._groups.clear()
        if id(job) in self._waiting:
            self._begin(self._waiting.pop(id(job)))
        while self._waiting and self._ahead < AHEAD_BYTES:
            self._begin(self._waiting.pop(next(iter(self._waiting))))
        tensor = self._begun.pop(id(job))()
        self._ahead -= job.nbytes
        return tensor

    def _begin(self, job: Job) -> None:
        self._ahead += job.nbytes
        self._begun[id(job)] = job.begin(self._pool)

    def close(self) -> None:
        """End the threads; jobs that have not begun are dropped."""
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
