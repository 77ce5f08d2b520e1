"""How many seconds of a run a GPU would save."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from emp_kernels.dispatch import resolve

__all__ = ["Work", "seconds_saved"]


_CORE = {
    "pack": {"simd": 2.1, "scalar": 0.84},
    "prune": {"simd": 3.2, "scalar": 0.97},
    "unpack": {"simd": 2.5, "scalar": 0.99},
}
"""GB/s of weights that one core prunes, packs or unpacks; measured, bfloat16, rows of 4,096."""

_HANDING = 6.0
"""GB/s of weights that one core reads, hashes and hands on; 7 measured without a disk."""

_DISK = 5.0
"""GB/s of weights that all cores and GPUs together read and write on the disks; assumed."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of one process.

    Attributes:
        kernel: What is done with the weights.
        nbytes: Bytes of the weights, dense.
        cores: Cores that the process may use.
        processes: How many processes on this machine work at the same time.
    """

    kernel: Literal["pack", "prune", "unpack"]
    nbytes: int
    cores: int
    processes: int = 1


def seconds_saved(work: Work) -> float:
    """By how many seconds a GPU makes the work shorter, not counting its start-up; at least 0.

    With and without a GPU, each core reads, hashes and hands on `_HANDING` GB/s, and the processes
    of the machine share what the disks give, `_DISK` GB/s. Without a GPU the cores run the kernels
    as well. A GPU's kernels and its bus are faster than both and are not counted; nor are passes
    that only count weights, which are as fast as reading either way.
    """
    core = 1 / (1 / _CORE[work.kernel][resolve("auto")] + 1 / _HANDING)
    disk = _DISK / work.processes
    without, with_gpu = min(work.cores * core, disk), min(work.cores * _HANDING, disk)
    return work.nbytes / 1e9 * (1 / without - 1 / with_gpu)
