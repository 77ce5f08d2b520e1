"""A disk that is full after some bytes."""

import errno
import os
import threading
from collections.abc import Callable

import pytest


def limit_disk(monkeypatch: pytest.MonkeyPatch, room: int) -> Callable[[], int]:
    """Let os.pwrite take so many bytes, then find the disk full; returns what is left of them."""
    pwrite, lock = os.pwrite, threading.Lock()

    def write(fd: int, data: memoryview, offset: int) -> int:
        nonlocal room
        with lock:
            if room == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            count = pwrite(fd, memoryview(data)[:room], offset)
            room -= count
            return count

    monkeypatch.setattr("os.pwrite", write)
    return lambda: room
