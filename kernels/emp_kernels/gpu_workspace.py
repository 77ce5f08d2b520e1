"""What one thread needs to work on a GPU: pinned memory, memory of the GPU, and a stream."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import numpy as np
import numpy.typing as npt
import torch

from emp_kernels.rows import Bytes, Workspace

__all__ = ["DeviceWorkspace"]

_alone = threading.RLock()
"""Held for what only one thread may do at a time, see `DeviceWorkspace.active`."""


class DeviceWorkspace(Workspace):
    """Buffers and a stream of one thread whose kernels run on a device; not thread-safe.

    Host buffers are pinned (page-locked), so that copies from and to them go on while the thread
    does other work and while other threads' streams compute. Buffers are used again by name: what
    was returned for a name is overwritten by the next call with that name.

    Args:
        device: A GPU; the CPU where Triton's interpreter stands in for one.
    """

    device: torch.device

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self._used = False
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._on_device: dict[str, torch.Tensor] = {}

    def _make(self, nbytes: int) -> Bytes:
        host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=self._stream is not None)
        buffer: Bytes = host.numpy()
        return buffer

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make the device current, and its stream the one that kernels and copies go to.

        Threads take turns in Triton's interpreter, which keeps the program that runs in a global
        variable. On a GPU they do so the first time only, so that each kernel is compiled by one of
        them and found in the cache by the others.

        After an error the stream is waited for, so that the caller may free memory that copies and
        kernels still had to read or write.
        """
        with ExitStack() as stack:
            if self._stream is None or not self._used:
                stack.enter_context(_alone)
            if self._stream is not None:
                stack.enter_context(torch.cuda.device(self.device))
                stack.enter_context(torch.cuda.stream(self._stream))
            try:
                yield
            except BaseException:
                with suppress(RuntimeError):  # the first error is raised, not one that follows
                    self.wait()
                raise
            self._used = True

    def on_device(self, name: str, nbytes: int) -> torch.Tensor:
        """A uint8 [nbytes] tensor on the device; what it holds is unspecified.

        It starts at a multiple of 16 bytes.
        """
        buffer = self._on_device.get(name)
        if buffer is None or buffer.numel() < nbytes:
            self._on_device.pop(name, None)
            buffer = torch.empty(max(nbytes, 16), dtype=torch.uint8, device=self.device)
            self._on_device[name] = buffer
        return buffer[:nbytes]

    def upload(self, name: str, array: npt.NDArray[np.generic]) -> torch.Tensor:
        """An array's bytes on the device, uint8 [nbytes]; ordered before what the stream does next.

        What is not pinned is copied to a pinned buffer first. From pageable memory, a driver may
        read at any later time, or block the thread until all earlier work of the stream is done.

        Args:
            name: Of the buffer on the device, and of the pinned one. Not to be used again before
                `wait` returns, except for the same bytes.
            array: C-contiguous; not to be changed before `wait` returns.
        """
        data = array.reshape(-1).view(np.uint8)
        if not self._is_pinned(data):
            pinned = self.take(f"{name} to upload", data.size)[: data.size]
            pinned[:] = data
            data = pinned
        there = self.on_device(name, data.size)
        there.copy_(torch.from_numpy(data), non_blocking=True)
        return there

    def _is_pinned(self, data: Bytes) -> bool:
        """Whether a GPU can copy from this memory by itself."""
        # read-only arrays (of mapped files) are never pinned, and torch warns of tensors over them
        if not data.flags.writeable:
            return False
        return self._stream is None or torch.from_numpy(data).is_pinned()

    def download(self, name: str, tensor: torch.Tensor) -> Bytes:
        """A contiguous tensor's bytes on the host, uint8 [nbytes]; valid once `wait` returns.

        Args:
            name: Of the buffer on the host, as for `take`.
            tensor: On the device.
        """
        host = self.take(name, tensor.nbytes)[: tensor.nbytes]
        self.fetch(tensor, host)
        return host

    def fetch(self, tensor: torch.Tensor, array: npt.NDArray[np.generic]) -> None:
        """Copy a contiguous tensor's bytes to an array of as many; they are there after `wait`."""
        data = tensor.reshape(-1).view(torch.uint8)
        torch.from_numpy(array.reshape(-1).view(np.uint8)).copy_(data, non_blocking=True)

    def wait(self) -> None:
        """Wait until the stream has done all work that was put on it."""
        if self._stream is not None:
            self._stream.synchronize()
