"""Processes of their own for work that is killed, or done by several ranks; quick to start.

A server that has imported what the work needs makes a copy of itself for each.
"""

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["support.warmed"])

# every way in which a process changes a file or folder, and waits for the disk
STEPS = ("pwrite", "fsync", "replace", "rename", "mkdir", "rmdir", "unlink")

Process = multiprocessing.context.ForkServerProcess


def start(
    work: Callable[..., object],
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    killed_at: int | None = None,
    output: Path | None = None,
) -> Process:
    """Start work in a process of its own; exit status 0, or 1 after an error, which is printed.

    With `killed_at` it is killed before it takes the step of that number, see `STEPS`; what it
    prints goes to `output`, if that is given.
    """
    _start_server()
    process = _CONTEXT.Process(
        target=_work,
        args=(work, arguments, dict(environment or {}), killed_at, output),
        daemon=True,
    )
    process.start()
    return process


def _start_server() -> None:
    """Let the server find what it is to import, which Python 3.11 does not by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()


def _work(
    work: Callable[..., object],
    arguments: Sequence[object],
    environment: Mapping[str, str],
    killed_at: int | None,
    output: Path | None,
) -> None:
    os.environ.update(environment)
    if output is not None:
        with output.open("wb") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
    if killed_at is not None:
        _kill_at(killed_at)
    try:
        work(*arguments)
    except Exception:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _kill_at(step: int) -> None:
    steps = iter(range(1 << 30))

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: object, **kwargs: object) -> object:
            if next(steps) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    for name in STEPS:
        setattr(os, name, counted(getattr(os, name)))


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What torchrun tells one of several processes."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
