"""Several processes that prune one checkpoint together.

They meet at torch's key-value store, see `emp_llm.runtime.launcher`. Only a few small values go
through it: the weights go by way of the file system that the processes share.

A rank that fails announces why, and the others stop. One that is killed is noticed because its
signs of life end: at once by ranks on its machine, after `PATIENCE` by the others.
"""

import itertools
import json
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from emp_llm.errors import EmpError, RankError
from emp_llm.runtime.launcher import Meeting
from emp_llm.runtime.rank_store import MEETING_SECONDS, open_store, read_text, write_json
from emp_llm.runtime.team import Team

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

__all__ = ["join_team"]

T = TypeVar("T")

PATIENCE = 60.0
"""Seconds without a sign of life after which a rank on another machine counts as gone."""

_BEAT = 0.25
"""Seconds between two signs of life."""

_PARTING = 10.0
"""Seconds to wait, at most, for ranks that have to stop."""

_FAILED = "failed"
_JOINED = itertools.count()
_GONE = "ended without a word, killed or with its machine: run the command again"
_STORE_GONE = f"rank 0 of them, or what started them, {_GONE}"


@contextmanager
def join_team(meeting: Meeting | None) -> Iterator[Team]:
    """Meet the other ranks; None for a process that works alone.

    Raises:
        RankError: If they cannot be met, or one of them failed.
    """
    if meeting is None:
        yield Team()
        return
    from torch.distributed.distributed_c10d import PrefixStore

    # a launcher's store outlives this run, and the next run of these processes must not read
    # what this one left: each has keys of its own
    ranks = _Ranks(meeting, PrefixStore(f"emp-llm/{next(_JOINED)}", open_store(meeting)))
    try:
        with ranks.working():
            ranks.meet()
            yield ranks
            ranks.part()
    except BaseException:
        ranks.part_after_failure()
        raise


class _Ranks(Team):
    """One of several processes.

    Keys of the store: ``share/CALL`` and ``gather/CALL/RANK`` hold values, ``alive/RANK`` a sign of
    life, ``failed`` the first failure, ``stopped/RANK`` and ``left/RANK`` that a rank has stopped
    working or has gone.
    """

    def __init__(self, meeting: Meeting, store: "Store") -> None:
        self.rank = meeting.rank
        self.size = meeting.size
        self.local_size = meeting.local_size
        self._store = store
        self._calls = 0
        self._done = 0
        self._advance: Callable[[int], None] = lambda _nbytes: None
        self._failure: RankError | None = None
        self._stops: list[Callable[[], None]] = []
        self._ended = threading.Event()
        self._signs: dict[int, tuple[str, float]] = {}
        self._others = dict.fromkeys(range(self.size), 0)
        self._watch = threading.Thread(target=self._watching, name="emp-ranks", daemon=True)

    def meet(self) -> None:
        """Wait for the others."""
        self._beat(0)
        self._gather(None, give_up=time.monotonic() + MEETING_SECONDS)
        self._watch.start()

    def part(self) -> None:
        """The work is done; the first rank, which may hold the store, is the last to go."""
        with self._answering():
            self._store.set(f"left/{self.rank}", "")
        if self.leads:
            self._wait_for("left", range(self.size))
        self._end()

    def part_after_failure(self) -> None:
        """Go when the first rank has cleared up: a launcher ends it when another has gone."""
        with suppress(RuntimeError):
            if self.leads:
                self._store.set("left/0", "")
            else:
                self._wait_for("left", [0])

    def share(self, make: Callable[[], T]) -> T:
        self._calls += 1
        key = f"share/{self._calls}"
        if self.leads:
            value = make()
            with self._answering():
                write_json(self._store, key, value)
            return value
        shared: T = json.loads(self._wait_for_text(key))
        return shared

    def gather(self, value: T) -> list[T]:
        return self._gather(value)

    def check(self, nbytes: int = 0) -> None:
        self._done += nbytes
        if self._failure is not None:
            raise self._failure

    def forward_progress(self, advance: Callable[[int], None]) -> None:
        self._advance = advance

    @contextmanager
    def stopping(self, stop: Callable[[], None]) -> Iterator[None]:
        self._stops.append(stop)
        try:
            self.check()  # of a failure that came before, nobody calls `stop`
            yield
        finally:
            self._stops.remove(stop)

    @contextmanager
    def working(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if self._ended.is_set():  # announced already, in an inner block
                raise
            failure = self._failure  # of another rank, which this error may come of
            self._announce(error, own=failure is None)
            self._end()
            if failure not in (None, error) and isinstance(error, Exception):
                raise failure from error
            raise

    def _announce(self, error: BaseException, *, own: bool) -> None:
        """Announce a failure, if it is this rank's own, and wait until all have stopped."""
        with suppress(RuntimeError):  # the store may be gone with the rank that holds it
            if own:
                what = str(error) if isinstance(error, EmpError | OSError) else repr(error)
                where = f"rank {self.rank} of {self.size} (on {socket.gethostname()})"
                failure = f"{where} failed: {what}", getattr(error, "may_pass", True)
                self._store.compare_set(_FAILED, "", json.dumps(failure))
            self._store.set(f"stopped/{self.rank}", "")
            if self.leads:
                self._wait_for("stopped", range(self.size))

    def _end(self) -> None:
        self._ended.set()
        if self._watch.is_alive() and threading.current_thread() is not self._watch:
            self._watch.join(_PARTING)

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Explain why the store does not answer, which torch says with a RuntimeError."""
        try:
            yield
        except RuntimeError as error:
            raise (self._failure or self._fail(_STORE_GONE)) from error

    def _gather(self, value: T, give_up: float = math.inf) -> list[T]:
        self._calls += 1
        key = f"gather/{self._calls}"
        with self._answering():
            write_json(self._store, f"{key}/{self.rank}", value)
        texts = [self._wait_for_text(f"{key}/{rank}", give_up) for rank in range(self.size)]
        return [json.loads(text) for text in texts]

    def _wait_for_text(self, key: str, give_up: float = math.inf) -> bytes:
        """The JSON text of a value, once another rank has stored it."""
        pause = 0.001
        with self._answering():
            while not self._store.check([key]):
                self.check()
                if time.monotonic() > give_up:
                    raise RankError(
                        f"not all of the {self.size} ranks started within {MEETING_SECONDS} s: "
                        "look at the others' output, and start all of them together"
                    )
                # values come within milliseconds or, while another rank works, within minutes
                time.sleep(pause)
                pause = min(2 * pause, 0.1)
            return read_text(self._store, key)

    def _wait_for(self, what: str, ranks: Iterable[int]) -> None:
        """Wait until these ranks have said so, or have ended, or it has taken too long."""
        give_up = time.monotonic() + _PARTING
        with suppress(RuntimeError):
            while time.monotonic() < give_up:
                living = [rank for rank in ranks if rank == self.rank or self._lives(rank)]
                if all(self._store.check([f"{what}/{rank}"]) for rank in living):
                    return
                time.sleep(0.02)

    def _beat(self, tick: int) -> None:
        """Give a sign of life, which is another one at each tick."""
        sign = json.dumps([tick, self._done, _machine(), os.getpid()])
        self._store.set(f"alive/{self.rank}", sign)

    def _watching(self) -> None:
        """Give signs of life, and look for those of others, until the end."""
        tick = 0
        while not self._ended.wait(_BEAT):
            tick += 1
            try:
                self._beat(tick)
                if self._store.check([_FAILED]):
                    self._fail(*json.loads(self._store.get(_FAILED)))
                    return
                # the first rank watches all others, which watch only it: n signs to read, not n²
                for rank in range(self.size) if self.leads else (0,):
                    if rank != self.rank and not self._lives(rank):
                        gone = f"rank {rank} of {self.size} {_GONE}"
                        self._store.compare_set(_FAILED, "", json.dumps([gone, True]))
                        self._fail(gone)
                        return
            except RuntimeError:  # of the store, which the launcher or the first rank holds
                if not self._ended.is_set():
                    self._fail(_STORE_GONE)
                return

    def _lives(self, rank: int) -> bool:
        """Whether another rank gives signs of life, or has said that it goes."""
        if not self._store.check([f"alive/{rank}"]):  # it has not come yet
            return False
        sign = self._store.get(f"alive/{rank}").decode()
        now = time.monotonic()
        last, since = self._signs.get(rank, ("", now))
        if sign != last:  # clocks of machines differ: what counts is when this one saw it change
            last, since = sign, now
        self._signs[rank] = last, since
        _, done, host, pid = json.loads(sign)
        if self.leads and done != self._others[rank]:
            self._advance(done - self._others[rank])
            self._others[rank] = done
        gone = now - since > PATIENCE or (host == _machine() and not _runs(pid))
        return not gone or self._store.check([f"left/{rank}"])

    def _fail(self, what: str, may_pass: bool = True) -> RankError:
        """Take note of the first failure of another rank, and stop what this one does."""
        if self._failure is None:
            self._failure = RankError(f"{what}; all ranks stopped", may_pass=may_pass)
        for stop in list(self._stops):
            stop()
        return self._failure


def _runs(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with suppress(OSError, IndexError):  # a zombie has ended too
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


def _machine() -> str:
    """Where process numbers mean the same: the host, and on it the container."""
    with suppress(OSError):
        return f"{socket.gethostname()} {Path('/proc/self/ns/pid').stat().st_ino}"
    return socket.gethostname()
