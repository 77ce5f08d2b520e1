"""The GPUs that a run works on: those that were asked for, or those that make it faster.

    --device → none, all or one of the GPUs → this rank's share → a workspace for each thread

Torch is imported where a GPU is asked for, or is worth it, and there is one: it takes seconds.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from emp_kernels.dispatch import pack_rows, unpack_rows
from emp_kernels.errors import NoDeviceError
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import BF16
from emp_kernels.rows import PerRow, Workspace

from emp_llm.errors import DeviceError, OptionError
from emp_llm.messages import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from emp_llm.runtime.team import Team
from emp_llm.runtime.gpu_gain import Work, seconds_saved

__all__ = [
    "CPU",
    "Devices",
    "asked_devices",
    "check_device",
    "device_of_kernels",
    "find_gpus",
    "share_of",
    "worthwhile_devices",
]


_A_ROW = RowLayout(number_format=BF16, columns=16)

_START_UP = 10.0
"""Seconds until torch, its context and the compiled kernels are there; assumed."""

_MARGIN = 1.5
"""How many times the start-up must be saved, for half of this is assumed."""

_ROOM = 4 << 30
"""Free bytes of a GPU that is taken unasked: eight threads need some 2 GB, whatever the weights."""


@dataclass(frozen=True)
class Devices:
    """What the kernels of a run work on.

    Attributes:
        gpus: The GPUs, which its threads share in turn; the CPU's kernels work where it is empty.
    """

    gpus: tuple[torch.device, ...] = ()

    @property
    def told(self) -> str:
        """Where the work is done, to be told of a stage; empty for the CPU."""
        if not self.gpus:
            return ""
        if len(self.gpus) > 1:
            return f" on {len(self.gpus)} GPUs"
        return f" on {self.gpus[0]}" if self.gpus[0].type == "cuda" else " in Triton's interpreter"

    def workspace(self, thread: int) -> Workspace:
        """The workspace of a thread, to be made in it: thread i works on GPU i mod n."""
        if not self.gpus:
            return Workspace()
        from emp_kernels.gpu_workspace import DeviceWorkspace

        return DeviceWorkspace(self._gpu(thread))

    def explained(self, error: BaseException, thread: int) -> BaseException:
        """The error to raise for what a thread failed with: itself, or one that tells the user.

        Args:
            error: The failure.
            thread: The thread's number.
        """
        # by its text, too: pinned memory and Triton have other errors than torch's memory
        if (
            not self.gpus
            or not isinstance(error, RuntimeError)
            or "out of memory" not in str(error)
        ):
            return error
        explained = DeviceError(
            f"{self._gpu(thread)}: has no room for the blocks of its threads "
            f"({first_line(error)}): end what else runs on it, give fewer --threads, or "
            "--device cpu"
        )
        explained.__cause__ = error
        return explained

    def _gpu(self, thread: int) -> torch.device:
        return self.gpus[thread % len(self.gpus)]


CPU = Devices()
"""No GPU."""


def check_device(device: str) -> None:
    """Refuse a device that is not there for torch; the kernels may need more.

    Raises:
        OptionError: If it is none of auto, cpu, cuda and cuda:N, or this machine has none such.
    """
    if not _names_gpus(device):
        return
    from emp_kernels.gpu_devices import visible_gpus

    try:
        visible_gpus(device)
    except NoDeviceError as error:
        raise _refused(device, error) from error


def asked_devices(device: str, team: Team) -> Devices | None:
    """The devices that a user asked for, in so many words.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` (all GPUs of this machine) or ``cuda:N``.
        team: The processes that take part, all of which call this: those that see the same GPUs
            share them.

    Returns:
        None for ``auto``; see `worthwhile_devices`.

    Raises:
        OptionError: If it is none of these, or this machine has none such, or the kernels do not
            run on it.
    """
    if not _names_gpus(device):
        return None if device == "auto" else CPU
    devices = _shared(find_gpus(device), team)
    try:
        return _ready(devices)
    except NoDeviceError as error:
        raise _refused(device, error) from error


def find_gpus(device: str) -> list[torch.device]:
    """The GPUs that a user asked for in so many words; none for ``auto`` and ``cpu``.

    Raises:
        OptionError: As `asked_devices`, but that no kernel is run yet.
    """
    if not _names_gpus(device):
        return []
    from emp_kernels.gpu_devices import find_devices

    try:
        return find_devices(device)
    except NoDeviceError as error:
        raise _refused(device, error) from error


def worthwhile_devices(work: Work, team: Team) -> Devices:
    """The GPUs of this machine if they make the run faster, see `seconds_saved`; else none.

    Those that others fill are left alone, so that the run does not end for want of room. Whatever
    the kernels lack to run on them, the CPU does the work then.

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
        return _ready(devices)
    except NoDeviceError:
        return CPU


def device_of_kernels(device: torch.device | str | int) -> torch.device | None:
    """Where kernels make weights that are to be on a device: there, or None for the CPU.

    The CPU makes them, and they are copied then, unless it is a GPU that the kernels run on.

    Args:
        device: What torch takes for a device.
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
    """Whether kernels run on a GPU; one that unpacks is tried."""
    from emp_kernels.gpu_devices import find_devices, interpreted

    try:
        if interpreted():
            return False
        _ready(Devices(tuple(find_devices(str(gpu)))), _unpack_a_row)
    except NoDeviceError:
        return False
    return True


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
        OptionError: If it is none that there could be.
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
    """What a GPU is called by all processes that see it."""
    import torch

    return str(torch.cuda.get_device_properties(gpu).uuid) if gpu.type == "cuda" else str(gpu)


def _has_room(gpu: torch.device) -> bool:
    """Whether there is room on a GPU for the work of its threads."""
    import torch

    try:
        free, _ = torch.cuda.mem_get_info(gpu)
    except RuntimeError:  # not even for torch's own part, or another process has the GPU alone
        return False
    return free >= _ROOM


def _pack_a_row(workspace: Workspace) -> None:
    ones = np.full((1, 16), 0x3F80, np.uint16)
    pack_rows(ones, _A_ROW, PerRow(1.0), workspace=workspace)


def _unpack_a_row(workspace: Workspace) -> None:
    nothing_kept = np.zeros((1, 3), np.int64)
    unpack_rows(np.empty(0, np.uint8), nothing_kept, _A_ROW, workspace=workspace)


def _ready(devices: Devices, trial: Callable[[Workspace], None] = _pack_a_row) -> Devices:
    """The same devices, once a kernel has run on each.

    Args:
        devices: They.
        trial: Runs it.

    Raises:
        NoDeviceError: If it does not, such as for want of a C compiler, which Triton needs.
    """
    for thread, gpu in enumerate(devices.gpus):
        try:
            trial(devices.workspace(thread))
        except Exception as error:  # of the driver, or of any of the compilers that Triton calls
            raise NoDeviceError(f"the kernels do not run on {gpu} ({first_line(error)})") from error
    return devices


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
