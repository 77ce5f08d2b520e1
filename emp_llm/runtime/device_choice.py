"""The GPUs that a run works on: those that were asked for, or those that make it faster.

    --device → none, one or all of the GPUs → this rank's share → each tried with a kernel

Importing torch takes seconds, so it is done only where a GPU is asked for, or pays and is there.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from emp_kernels.errors import NoDeviceError

from emp_llm.errors import OptionError
from emp_llm.runtime.device_trial import tried
from emp_llm.runtime.devices import CPU, Devices
from emp_llm.runtime.gpu_gain import Work, seconds_saved

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from emp_llm.runtime.team import Team

__all__ = ["asked_devices", "check_device", "find_gpus", "share_of", "worthwhile_devices"]

_START_UP = 10.0
"""Seconds until torch, its context and the compiled kernels are there; assumed."""

_MARGIN = 1.5
"""How many times the start-up must be saved, for half of this is assumed."""

_ROOM = 4 << 30
"""Free bytes of a GPU that is taken unasked: eight threads need some 2 GB, whatever the weights."""


def check_device(device: str) -> None:
    """Refuse a device that torch does not find; the kernels may need more.

    Raises:
        OptionError: If it is none of auto, cpu, cuda and cuda:N, or this machine has none
            such.
    """
    if not _names_gpus(device):
        return
    from emp_kernels.gpu_devices import visible_gpus

    try:
        visible_gpus(device)
    except NoDeviceError as error:
        raise _refused(device, error) from error


def asked_devices(device: str, team: Team) -> Devices | None:
    """The devices that a user asked for explicitly.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` (all GPUs of this machine) or ``cuda:N``.
        team: The ranks, all of which call this: those that see the same GPUs share them.

    Returns:
        None for ``auto``; see `worthwhile_devices`.

    Raises:
        OptionError: If it is none of these, or this machine has no such device, or the kernels do
            not run on it.
    """
    if not _names_gpus(device):
        return None if device == "auto" else CPU
    devices = _shared(find_gpus(device), team)
    try:
        return tried(devices)
    except NoDeviceError as error:
        raise _refused(device, error) from error


def find_gpus(device: str) -> list[torch.device]:
    """The GPUs that a user asked for explicitly; none for ``auto`` and ``cpu``.

    Raises:
        OptionError: As `asked_devices`, but no kernel is run yet.
    """
    if not _names_gpus(device):
        return []
    from emp_kernels.gpu_devices import find_devices

    try:
        return find_devices(device)
    except NoDeviceError as error:
        raise _refused(device, error) from error


def worthwhile_devices(work: Work, team: Team) -> Devices:
    """The GPUs of this machine if they make the run faster, see `seconds_saved`; else the CPU.

    GPUs whose memory others fill are left alone, so that the run does not end for want of room. If
    the kernels lack something to run on them, such as Triton, the CPU does the work.

    Args:
        work: What this process is to do.
        team: As for `asked_devices`.
    """
    gpus: list[torch.device] = []
    if seconds_saved(work) > _MARGIN * _START_UP and _driver_has_gpu():
        from emp_kernels.gpu_devices import find_devices, interpreted

        try:
            gpus = [] if interpreted() else [gpu for gpu in find_devices() if _has_room(gpu)]
        except NoDeviceError:
            gpus = []
    devices = _shared(gpus, team)
    try:
        return tried(devices)
    except NoDeviceError:
        return CPU


def share_of(seen: Sequence[Sequence[str]], rank: int) -> list[int]:
    """Which of the GPUs that a rank sees are its own.

    Ranks that see the same ones share them: each takes every n-th, or one with others where there
    are fewer GPUs than ranks. Where a launcher gave each rank GPUs of its own, it has them alone.

    Args:
        seen: The names of the GPUs that each rank sees, the same everywhere; none where it takes
            none.
        rank: The rank.

    Returns:
        Places in `seen[rank]`; empty only if that is.
    """
    sharing = [other for other, names in enumerate(seen) if names == seen[rank]]
    place, count = sharing.index(rank), len(seen[rank])
    if not count:
        return []
    return list(range(place, count, len(sharing))) or [place % count]


def _names_gpus(device: str) -> bool:
    """Whether a device that a user asked for is GPUs.

    Raises:
        OptionError: If there is no such kind of device.
    """
    if device in ("auto", "cpu"):
        return False
    kind, colon, number = device.partition(":")
    if kind != "cuda" or (colon and not number.isdecimal()):
        raise OptionError(f"device is {device!r}; choose one of auto, cpu, cuda and cuda:N")
    return True


def _refused(device: str, error: NoDeviceError) -> OptionError:
    return OptionError(f"device is {device!r}; {error}: choose auto or cpu")


def _shared(gpus: Sequence[torch.device], team: Team) -> Devices:
    """This rank's share of the GPUs that it sees; all ranks call it."""
    seen = team.gather([_name(gpu) for gpu in gpus])
    return Devices(tuple(gpus[place] for place in share_of(seen, team.rank)))


def _name(gpu: torch.device) -> str:
    """A name that is the same in all processes that see the GPU, whatever its number there."""
    import torch

    return str(torch.cuda.get_device_properties(gpu).uuid) if gpu.type == "cuda" else str(gpu)


def _has_room(gpu: torch.device) -> bool:
    """Whether a GPU has memory for the work of its threads."""
    import torch

    try:
        free, _ = torch.cuda.mem_get_info(gpu)
    except RuntimeError:  # no memory even for torch's context, or a GPU in exclusive mode
        return False
    return free >= _ROOM


def _driver_has_gpu() -> bool:
    """Whether NVIDIA's driver is there and has a GPU for this process; torch is not needed."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int()
    return (
        not driver.cuInit(0)
        and not driver.cuDeviceGetCount(ctypes.byref(count))
        and count.value > 0
    )
