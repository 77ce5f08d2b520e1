"""Lets a kernel run on several threads at once: those of torch, for a second pool would fight them.

torch on CPUs computes with OpenMP. Its threads wait between products for the next one, so a kernel
that they run starts within microseconds, where a pool of Python threads takes tens of them. What
compilers call for a parallel region, ``GOMP_parallel``, can be called like any function: it is
there as soon as torch is imported. Where it is not, everything runs on the calling thread.

A *job* is an int64 array of numbers and addresses that says what is to be done. A *worker* is a
function that takes the address of a job; each thread of the team calls it once. The workers take
*row blocks* from a counter in the job until none is left, so that a thread that is slowed down
takes fewer. Rows depend on nothing but themselves, so their bits depend on no number of threads.

A process that was forked has none of the threads that OpenMP believes to have, and would wait for
them forever. There, too, everything runs on the calling thread.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from emp_kernels.rows import Bytes

__all__ = [
    "FIRST_FREE",
    "JOB_SIZE",
    "Job",
    "array_at",
    "job_at",
    "next_block",
    "own_scratch",
    "run",
    "scratch",
    "team_size",
    "worker_address",
]

Job = npt.NDArray[np.int64]

JOB_SIZE = 64
"""Items of a job."""
_NEXT, _SEEN, _ROWS, _BLOCK, _SCRATCH, _STRIDE, _UNUSED, _PAST = range(8)
FIRST_FREE = _PAST + 1
"""The first item of a job that is not the team's, but says what the worker is to do."""

_PROCESS = os.getpid()
"""The process that loaded this module; one forked from it has another."""

_SMALL = 1 << 16
"""Products of so few weights are done before another thread has begun."""

_njit = numba.njit(nogil=True, cache=True)
_I64 = ir.IntType(64)


# ── what workers call ──


@intrinsic
def _as_pointer(_context: Any, address: Any) -> Any:
    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), codegen


@intrinsic
def _fetch_add(_context: Any, address: Any, amount: Any) -> Any:
    """Add to the int64 at an address, of which other threads see all or nothing; what it was."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.atomic_rmw("add", place, arguments[1], "monotonic")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def _call_worker(_context: Any, worker: Any, job: Any) -> Any:
    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I64])
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), [arguments[1]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def _call_parallel(_context: Any, parallel: Any, worker: Any, job: Any, threads: Any) -> Any:
    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        parallel, worker, job, threads = arguments
        i32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [_I64, _I64, i32, i32])
        flags = ir.Constant(i32, 0)
        builder.call(
            builder.inttoptr(parallel, kind.as_pointer()),
            [worker, job, builder.trunc(threads, i32), flags],
        )
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


@_njit
def array_at(address, items, dtype):
    """The array of so many items of a dtype at an address."""
    return numba.carray(_as_pointer(address), (items,), dtype)


@_njit
def job_at(address):
    """The job at an address."""
    return array_at(address, JOB_SIZE, np.int64)


@_njit
def own_scratch(job):
    """The address of the scratch of the worker that calls this, for a job; call it once."""
    place = _fetch_add(job.ctypes.data + 8 * _SEEN, 1)
    return job[_SCRATCH] + place * job[_STRIDE]


@_njit
def next_block(job):
    """The next row block of a job: its first row, and the row past its last; the same if none."""
    rows = job[_ROWS]
    first = _fetch_add(job.ctypes.data + 8 * _NEXT, job[_BLOCK])
    return min(first, rows), min(first + job[_BLOCK], rows)


# ── what starts them ──


@_njit
def run(job, worker, rows, work, room, stride, team):
    """Run a worker over all rows of a job, and wait until it is done.

    Args:
        job: int64 [JOB_SIZE], from `FIRST_FREE` on what the worker reads; the rest is written here.
        worker: Its address, see `worker_address`.
        rows: How many rows there are.
        work: How much there is to do, in weights times tokens.
        room: Address of as many times `stride` bytes as the team has threads.
        stride: Bytes of scratch of one thread, a multiple of 64.
        team: (threads, address of what runs a function on them), see `team_size`.
    """
    threads, parallel = team
    job[_NEXT], job[_SEEN], job[_ROWS] = 0, 0, rows
    job[_SCRATCH], job[_STRIDE] = room, stride
    if threads == 1 or work <= _SMALL:
        job[_BLOCK] = rows
        _call_worker(worker, job.ctypes.data)
        return
    # an eighth of a thread's share, so that the last ones end at about the same time; and 32 rows
    # or more, so that no two threads write to one line of the cache more often than they must
    job[_BLOCK] = max((rows // (8 * threads) + 31) // 32 * 32, 32)
    _call_parallel(parallel, worker, job.ctypes.data, threads)


@cache
def _openmp(torch_is_there: bool) -> tuple[Callable[[], int] | None, int]:
    """How to ask for the number of threads, and the address of ``GOMP_parallel``, if there."""
    symbols = ctypes.CDLL(None)
    if not torch_is_there or not hasattr(symbols, "GOMP_parallel"):
        return None, 0
    address = ctypes.cast(symbols.GOMP_parallel, ctypes.c_void_p).value
    return symbols.omp_get_max_threads, address or 0


def team_size(threads: int | None) -> tuple[int, int]:
    """How many threads a kernel may run on, and the address of what runs a function on them.

    Args:
        threads: As many at most; as many as torch takes in this thread if None.

    Raises:
        ValueError: If there are to be none.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"{threads} threads are asked for; 1 is the least")
    ask, parallel = _openmp("torch" in sys.modules)
    if ask is None or os.getpid() != _PROCESS:
        return 1, 0
    return ask() if threads is None else threads, parallel


_scratch = threading.local()


def scratch(nbytes: int) -> Bytes:
    """Memory of the calling thread for one call of a kernel; its next call gets the same."""
    held: Bytes | None = getattr(_scratch, "held", None)
    if held is None or held.size < nbytes:
        held = _scratch.held = np.empty(nbytes, np.uint8)
    return held


def worker_address(worker: Callable[[int], None]) -> int:
    """The address of a worker, compiled if it has not been; it takes the address of a job."""
    return int(_compiled(worker).address)


@cache
def _compiled(worker: Callable[[int], None]) -> Any:
    compile_worker = numba.cfunc(types.void(types.int64), cache=True, error_model="numpy")
    return compile_worker(worker)
