"""Pieces of work on several threads, whose results do not depend on the number of threads.

    compute (any thread, any order) → settle (one at a time, in order) → write (any thread)

To settle a piece is to do what order can change: offsets are given out, sums and hashes are
continued. No more than one piece a thread is in memory.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from typing import TypeVar

from emp_kernels.rows import Workspace

from emp_llm.errors import OptionError
from emp_llm.runtime.devices import CPU, Devices

__all__ = ["Advance", "Piece", "Write", "run_pieces", "thread_count"]

Result = TypeVar("Result")

Write = Callable[[], None]
"""Writes the result of a piece."""

Settle = Callable[[], Write | None]
"""Gives a result its place in the order of pieces, and returns what is left to write of it."""

Advance = Callable[[int], None]
"""Called with the bytes of input of each piece that is settled, from one thread at a time."""

_FEWEST_ON_GPU, _MOST_ON_GPU = 3, 8
"""Threads for each GPU: three so that copying to it, computing on it and copying back overlap;
eight, which read as fast as its bus carries."""


def thread_count(threads: int | None, processes: int = 1, gpus: int = 0) -> int:
    """The number of threads of a run.

    Args:
        threads: What was asked for; None for this process's share of the usable cores, and with
            GPUs for at least 3 and at most 8 threads for each of them.
        processes: How many processes on this machine work at the same time.
        gpus: How many GPUs this process works on.

    Raises:
        OptionError: If it is less than 1.
    """
    if threads is None:
        usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
        cores = len(usable) if usable else os.cpu_count() or 1
        share = max(1, cores // processes)
        return min(max(share, _FEWEST_ON_GPU * gpus), _MOST_ON_GPU * gpus) if gpus else share
    if threads < 1:
        raise OptionError(f"threads is {threads}; give 1 or more, or None for all cores")
    return threads


class Piece:
    """One piece of work.

    Args:
        nbytes: Bytes of input, for progress.
        compute: Does the work, at the same time as other pieces. Its result may lie in the
            workspace, which belongs to its thread until the piece is written.
        settle: Called with the result, in the order of the pieces; has to be quick. Returns what
            is left to write, if anything.
    """

    def __init__(
        self,
        nbytes: int,
        compute: Callable[[Workspace], Result],
        settle: Callable[[Result], Write | None],
    ) -> None:
        self.nbytes = nbytes
        # one function of both: what passes between them has a type here, and nowhere else
        self._compute: Callable[[Workspace], Settle] = lambda workspace: partial(
            settle, compute(workspace)
        )

    @staticmethod
    def note(settle: Settle) -> "Piece":
        """A piece that reads nothing and only settles, after what came before it."""
        return Piece(0, lambda _workspace: None, lambda _nothing: settle())

    def compute(self, workspace: Workspace) -> Settle:
        """Do the work; returns what settles it."""
        return self._compute(workspace)


class _Run:
    """The state that the threads of one run share.

    `pulling` guards `pieces`; `turn` guards everything else that changes.
    """

    def __init__(
        self,
        pieces: Iterable[Piece],
        threads: int,
        devices: Devices,
        progress: Advance | None,
        abandon: Callable[[], None],
    ) -> None:
        self.workers = [
            threading.Thread(target=self.work, args=(i,), name=f"emp-{i}", daemon=True)
            for i in range(threads)
        ]
        self.devices = devices
        self.pieces: Iterator[tuple[int, Piece]] = iter(enumerate(pieces))
        self.progress = progress
        self.abandon = abandon
        self.working = self.ended = 0
        self.pulling = threading.Lock()
        self.turn = threading.Condition()
        self.next_turn = 0
        self.failure: BaseException | None = None

    def work(self, thread: int) -> None:
        with self.turn:
            self.working += 1
        try:
            workspace = self.devices.workspace(thread)
            while (numbered := self.pull()) is not None:
                number, piece = numbered
                settle = piece.compute(workspace)
                write = self.settle_in_turn(number, piece.nbytes, settle)
                # after the turn: its place in the file is fixed, so writes may overlap in any order
                if write is not None:
                    write()
        except _StoppedError:
            pass
        except BaseException as failure:  # run_pieces raises it again
            self.stop(self.devices.explained(failure, thread))
        finally:
            with self.turn:
                self.working -= 1
                self.ended += 1
                self.turn.notify_all()

    def pull(self) -> tuple[int, Piece] | None:
        # one thread at a time: `pieces` may be a generator, which cannot be entered twice; and not
        # under `turn`, since the next piece may have to wait for a download
        with self.pulling:
            if self.failure is not None:
                return None
            return next(self.pieces, None)

    def settle_in_turn(self, number: int, nbytes: int, settle: Settle) -> Write | None:
        with self.turn:
            self.turn.wait_for(lambda: self.next_turn == number or self.failure is not None)
            if self.failure is not None:
                raise _StoppedError
            write = settle()
            if self.progress is not None:
                self.progress(nbytes)
            self.next_turn += 1
            self.turn.notify_all()
        return write

    def stop(self, failure: BaseException) -> None:
        with self.turn:
            if self.failure is None:
                self.failure = failure
            self.turn.notify_all()
        self.abandon()

    def wait(self) -> None:
        """Wait until no thread works any more, and none will.

        After a failure, threads that have not begun end at once.
        """
        # not by joining alone: Python takes a thread whose join was interrupted for ended
        with self.turn:
            self.turn.wait_for(
                lambda: (
                    not self.working
                    and (self.failure is not None or self.ended == len(self.workers))
                )
            )
        for worker in self.workers:
            if worker.is_alive():
                worker.join()


class _StoppedError(Exception):
    """Another thread failed."""


def run_pieces(
    pieces: Iterable[Piece],
    *,
    threads: int,
    devices: Devices = CPU,
    progress: Advance | None = None,
    abandon: Callable[[], None] = lambda: None,
) -> None:
    """Run all pieces; return when the last one is written.

    Args:
        pieces: The work, in its order; taken from one thread at a time, as it is needed.
        threads: How many threads compute and write; 1 or more.
        devices: What their kernels work on.
        progress: Called with the bytes of each piece.
        abandon: Called when the run has failed, to end whatever its threads may be waiting for in
            `pieces`.

    Raises:
        BaseException: The first failure of a piece, or KeyboardInterrupt; all threads have ended.
    """
    run = _Run(pieces, threads, devices, progress, abandon)
    try:
        for worker in run.workers:
            worker.start()
        run.wait()
    except BaseException as interruption:
        run.stop(interruption)
        with suppress(KeyboardInterrupt):
            run.wait()
        raise
    if run.failure is not None:
        raise run.failure
