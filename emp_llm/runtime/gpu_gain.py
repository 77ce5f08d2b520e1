"""What a GPU would save of a run: seconds on the cores, on the bus and on the disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from emp_kernels.dispatch import resolve

if TYPE_CHECKING:
    pass


__all__ = ["Work", "seconds_saved"]


_CORE = {
    "pack": {"simd": 2.1, "scalar": 0.84},
    "prune": {"simd": 3.2, "scalar": 0.97},
    "unpack": {"simd": 2.5, "scalar": 0.99},
}
"""GB of weights that one core does a second; measured, bfloat16 in rows of 4,096."""

_HANDING = 6.0
"""GB of weights that one core reads, hashes and hands on a second; 7 measured, the disk aside."""

_DISK = 5.0
"""GB/s of weights that all cores and GPUs together get from the disks and to them; assumed."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a process has to do.

    Attributes:
        kernel: What is done with the weights.
        nbytes: Bytes of them, dense.
        cores: Cores that it has for that.
        processes: How many processes on this machine work at the same time.
    """

    kernel: Literal["pack", "prune", "unpack"]
    nbytes: int
    cores: int
    processes: int = 1


def seconds_saved(work: Work) -> float:
    """By how many seconds a GPU makes the work shorter, its start-up aside; not below 0.

    Either way each core reads, hashes and hands on `_HANDING` GB/s, and what the disks give,
    `_DISK` GB/s, is shared by the processes of the machine. Without a GPU the cores run the
    kernels as well. A GPU's kernels and its bus are faster than both, and are not counted; nor are
    passes that only count weights, which are as fast as reading either way.
    """
    core = 1 / (1 / _CORE[work.kernel][resolve("auto")] + 1 / _HANDING)
    disk = _DISK / work.processes
    without, with_gpu = min(work.cores * core, disk), min(work.cores * _HANDING, disk)
    return work.nbytes / 1e9 * (1 / without - 1 / with_gpu)
