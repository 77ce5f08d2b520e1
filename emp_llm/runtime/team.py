"""Many processes that prune one checkpoint together, and what they tell each other.

They meet at torch's key-value store, see `emp_llm.runtime.launcher`. Nothing but a few small
values goes through it: the weights go by way of the file system that the processes share.

A rank that fails tells the others why, and they stop. One that ends without a word is noticed: at
once by ranks on its machine, after a while by the others.
"""

import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from emp_llm.errors import EmpError, RankError
from emp_llm.runtime.launcher import Meeting

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

__all__ = ["Team", "join_team"]

T = TypeVar("T")

PATIENCE = 60.0
"""Seconds without a sign of life after which a rank on another machine counts as gone."""

_MEETING_SECONDS = 600
_BEAT = 0.25
_PARTING = 10.0
_PART = 4 << 20
"""Characters of a value that go to the store at a time: it takes 8 MiB, reports are larger."""
_FAILED = "failed"
_JOINED = itertools.count()
_GONE = "ended without a word, killed or with its machine: run the command again"
_STORE_GONE = f"rank 0 of them, or what started them, {_GONE}"


class Team:
    """All processes of a run; this class is the one process that works alone.

    Attributes:
        rank: This process's number, from 0.
        size: How many there are.
        local_size: How many of them are on this machine.
    """

    rank = 0
    size = 1
    local_size = 1

    @property
    def leads(self) -> bool:
        """Whether this process does what one does for all."""
        return self.rank == 0

    def share(self, make: Callable[[], T]) -> T:
        """Have the first rank make a value that JSON can hold, and give it to all."""
        return make()

    def gather(self, value: T) -> list[T]:
        """Give the value of each rank, which JSON can hold, to all ranks, in their order."""
        return [value]

    def check(self, done: int = 0) -> None:
        """Take note of so many bytes done here, and raise RankError if another rank failed."""

    def tell_progress(self, advance: Callable[[int], None]) -> None:
        """From now on, the first rank calls `advance` with the bytes that others have done."""

    @contextmanager
    def stopping(self, stop: Callable[[], None]) -> Iterator[None]:  # noqa: ARG002
        """Within this block, a failure of another rank calls `stop`, from another thread."""
        yield

    @contextmanager
    def working(self) -> Iterator[None]:
        """Tell the others of an error that leaves this block, and raise theirs instead."""
        yield


@contextmanager
def join_team(meeting: Meeting | None) -> Iterator[Team]:
    """Meet the other ranks; alone, without any ado.

    Raises:
        RankError: If they cannot be met, or one of them failed.
    """
    if meeting is None:
        yield Team()
        return
    from torch.distributed.distributed_c10d import PrefixStore

    # a launcher's store outlives this run: the next of the same processes must not read of it
    ranks = _Ranks(meeting, PrefixStore(f"emp-llm/{next(_JOINED)}", _open_store(meeting)))
    try:
        with ranks.working():
            ranks.meet()
            yield ranks
            ranks.part()
    except BaseException:
        ranks.part_after_failure()
        raise


@cache
def _open_store(meeting: Meeting) -> "Store":
    """The store of all runs of these processes.

    Torch waits there for the others, deaf to signals, so it does so in a thread.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what fails is told by us
    from torch.distributed.rendezvous import rendezvous

    timeout = timedelta(seconds=_MEETING_SECONDS)
    at = meeting.url or "env://"
    found: Future[Store] = Future()

    def meet() -> None:
        try:
            found.set_result(next(rendezvous(at, meeting.rank, meeting.size, timeout=timeout))[0])
        except Exception as error:
            found.set_exception(error)

    threading.Thread(target=meet, name="emp-meeting", daemon=True).start()
    try:
        return found.result()
    except (RuntimeError, ValueError) as error:
        where = meeting.url or "MASTER_ADDR and MASTER_PORT"
        raise RankError(
            f"rank {meeting.rank} of {meeting.size} cannot meet the others at {where}: "
            f"{str(error).splitlines()[0]}; check that the first machine can be reached there"
        ) from error


class _Ranks(Team):
    """Several processes, which all go through the same calls in the same order."""

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
        self.gather(None, watch=False)
        self._watch.start()

    def part(self) -> None:
        """The work is done; the first rank, which may hold the store, is the last to go."""
        self._set(f"left/{self.rank}", "")
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
            self._set_json(key, value)
            return value
        return self._get(key)  # type: ignore[no-any-return]

    def gather(self, value: T, *, watch: bool = True) -> list[T]:
        self._calls += 1
        key = f"gather/{self._calls}"
        self._set_json(f"{key}/{self.rank}", value)
        return [self._get(f"{key}/{rank}", watch=watch) for rank in range(self.size)]

    def check(self, done: int = 0) -> None:
        self._done += done
        if self._failure is not None:
            raise self._failure

    def tell_progress(self, advance: Callable[[int], None]) -> None:
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
            if self._ended.is_set():  # told already, in an inner block
                raise
            failure = self._failure  # of another rank, which this error may come of
            self._tell(error, own=failure is None)
            self._end()
            if failure not in (None, error) and isinstance(error, Exception):
                raise failure from error
            raise

    def _tell(self, error: BaseException, *, own: bool) -> None:
        """Tell the others, unless it is they who failed, and have them stop before this returns."""
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

    def _set(self, key: str, value: str) -> None:
        try:
            self._store.set(key, value)
        except RuntimeError as error:
            raise self._lost() from error

    def _set_json(self, key: str, value: object) -> None:
        text = json.dumps(value)
        for start in range(0, len(text), _PART):
            self._set(f"{key}/from/{start}", text[start : start + _PART])
        self._set(key, str(len(text)))  # last, for it tells that all parts are there

    def _get(self, key: str, *, watch: bool = True) -> Any:  # noqa: ANN401 (any JSON)
        pause = 0.001
        give_up = time.monotonic() + _MEETING_SECONDS
        try:
            while not self._store.check([key]):
                self.check()
                if not watch and time.monotonic() > give_up:
                    raise RankError(
                        f"not all of the {self.size} ranks came within {_MEETING_SECONDS} s: "
                        "see what became of the others, and start them together"
                    )
                time.sleep(pause)
                pause = min(2 * pause, 0.1)
            starts = range(0, int(self._store.get(key)), _PART)
            parts = [self._store.get(f"{key}/from/{start}") for start in starts]
            return json.loads(b"".join(parts))
        except RuntimeError as error:
            raise self._lost() from error

    def _lost(self) -> RankError:
        """The error that tells why the store does not answer."""
        if self._failure is None:
            self._fail(_STORE_GONE)
        assert self._failure is not None  # noqa: S101 (just set)
        return self._failure

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
        self._store.set(
            f"alive/{self.rank}",
            json.dumps([tick, self._done, _machine(), os.getpid()]),
        )

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
                for rank in range(self.size) if self.leads else (0,):
                    if rank != self.rank and not self._lives(rank):
                        told = f"rank {rank} of {self.size} {_GONE}"
                        self._store.compare_set(_FAILED, "", json.dumps([told, True]))
                        self._fail(told)
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
        if sign != last:
            last, since = sign, now
        self._signs[rank] = last, since
        _, done, host, pid = json.loads(sign)
        if self.leads and done != self._others[rank]:
            self._advance(done - self._others[rank])
            self._others[rank] = done
        gone = now - since > PATIENCE or (host == _machine() and not _runs(pid))
        return not gone or self._store.check([f"left/{rank}"])

    def _fail(self, what: str, may_pass: bool = True) -> None:
        if self._failure is None:
            self._failure = RankError(f"{what}; all ranks stopped", may_pass=may_pass)
        for stop in list(self._stops):
            stop()


def _runs(pid: int) -> bool:
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
