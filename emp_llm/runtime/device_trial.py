"""Tests whether the kernels run on a GPU, by running one of them on a single row."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from emp_kernels.dispatch import pack_rows, unpack_rows
from emp_kernels.errors import NoDeviceError
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import BF16
from emp_kernels.rows import PerRow, Workspace

from emp_llm.messages import first_line
from emp_llm.runtime.devices import Devices

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = ["device_of_kernels", "tried"]

_A_ROW = RowLayout(number_format=BF16, columns=16)


def _pack_a_row(workspace: Workspace) -> None:
    ones = np.full((1, 16), 0x3F80, np.uint16)
    pack_rows(ones, _A_ROW, PerRow(1.0), workspace=workspace)


def _unpack_a_row(workspace: Workspace) -> None:
    nothing_kept = np.zeros((1, 3), np.int64)
    unpack_rows(np.empty(0, np.uint8), nothing_kept, _A_ROW, workspace=workspace)


def tried(devices: Devices, trial: Callable[[Workspace], None] = _pack_a_row) -> Devices:
    """The same devices, once a kernel has run on each.

    Args:
        devices: The devices.
        trial: Runs the kernel.

    Raises:
        NoDeviceError: If the kernel does not run, such as for want of a C compiler, which Triton
            needs.
    """
    for thread, gpu in enumerate(devices.gpus):
        try:
            trial(devices.workspace(thread))
        except Exception as error:  # of the driver, or of any of the compilers that Triton calls
            raise NoDeviceError(f"the kernels do not run on {gpu} ({first_line(error)})") from error
    return devices


def device_of_kernels(device: torch.device | str | int) -> torch.device | None:
    """The GPU whose kernels unpack weights that are to be on a device; None for the CPU's.

    Weights that the CPU unpacks are copied to the device afterwards.

    Args:
        device: A device as torch takes it.

    Returns:
        The device itself if it is a GPU that the kernels run on; otherwise None.
    """
    import torch

    wanted = torch.device(device)
    if wanted.type != "cuda" or not torch.cuda.is_available():
        return None
    number = torch.cuda.current_device() if wanted.index is None else wanted.index
    gpu = torch.device("cuda", number)
    return gpu if _unpacks(gpu) else None


@cache
def _unpacks(gpu: torch.device) -> bool:
    """Whether the kernel that unpacks runs on a GPU; it is tried once."""
    from emp_kernels.gpu_devices import find_devices, interpreted

    try:
        if interpreted():
            return False
        tried(Devices(tuple(find_devices(str(gpu)))), _unpack_a_row)
    except NoDeviceError:
        return False
    return True
