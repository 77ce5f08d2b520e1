"""One process from start to exit: its time, and the memory of it and its children together."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

import psutil

__all__ = ["Run", "run"]


@dataclass(frozen=True)
class Run:
    """What one process used: wall-clock and CPU seconds, peak resident bytes."""

    seconds: float
    user_seconds: float
    system_seconds: float
    peak_bytes: int


def run(command: list[str]) -> Run:
    """Run a command from start to exit; its peak memory is that of all its processes together."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peaks: list[int] = []
    sampler = threading.Thread(target=sample_memory, args=(process.pid, peaks))
    sampler.start()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    sampler.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[1:4])} … failed with status {process.returncode}")
    return Run(seconds, usage.ru_utime, usage.ru_stime, max(peaks))


def sample_memory(pid: int, peaks: list[int]) -> None:
    """Append, 20 times a second until it ends, what a process and its children have resident."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        while process.status() != psutil.STATUS_ZOMBIE:
            family = [process, *process.children()]
            peaks.append(sum(resident_bytes(member) for member in family))
            time.sleep(0.05)


def resident_bytes(process: psutil.Process) -> int:
    """What a process has resident; 0 if it has just ended."""
    with suppress(psutil.NoSuchProcess):
        return int(process.memory_info().rss)
    return 0
