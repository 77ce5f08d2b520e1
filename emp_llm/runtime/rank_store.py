"""Values that the ranks of a run exchange through torch's key-value store, as JSON."""

import json
import os
import threading
from concurrent.futures import Future
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING

from emp_llm.errors import RankError
from emp_llm.messages import first_line
from emp_llm.runtime.launcher import Meeting

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

__all__ = ["MEETING_SECONDS", "open_store", "read_text", "write_json"]

MEETING_SECONDS = 600
"""How long ranks wait for each other at the beginning."""

_PART = 4 << 20
"""Characters of a value that go to the store at a time: it takes 8 MiB, reports are larger."""


@cache
def open_store(meeting: Meeting) -> "Store":
    """The store of all runs of these processes.

    Raises:
        RankError: If the place where they meet cannot be reached.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # the RankError says what torch logs
    from torch.distributed.rendezvous import rendezvous

    timeout = timedelta(seconds=MEETING_SECONDS)
    at = meeting.url or "env://"
    found: Future[Store] = Future()

    def meet() -> None:
        try:
            found.set_result(next(rendezvous(at, meeting.rank, meeting.size, timeout=timeout))[0])
        except Exception as error:
            found.set_exception(error)

    # torch waits in C++ code that no signal interrupts: in a thread, so that Ctrl-C works here
    threading.Thread(target=meet, name="emp-meeting", daemon=True).start()
    try:
        return found.result()
    except (RuntimeError, ValueError) as error:
        where = meeting.url or "MASTER_ADDR and MASTER_PORT"
        raise RankError(
            f"rank {meeting.rank} of {meeting.size} cannot meet the others at {where}: "
            f"{first_line(error)}; check that the first machine can be reached there"
        ) from error


def write_json(store: "Store", key: str, value: object) -> None:
    """Store a value of any size under a key.

    Raises:
        RuntimeError: If the store does not answer.
    """
    text = json.dumps(value)
    for start in range(0, len(text), _PART):
        store.set(f"{key}/from/{start}", text[start : start + _PART])
    store.set(key, str(len(text)))  # last: once it is there, all parts are


def read_text(store: "Store", key: str) -> bytes:
    """The JSON text of a value that is stored.

    Raises:
        RuntimeError: If the store does not answer.
    """
    starts = range(0, int(store.get(key)), _PART)
    return b"".join(store.get(f"{key}/from/{start}") for start in starts)
