"""One safetensors file written as its tensors come, of sizes that are known only then.

The header stands first in the file but is known last, so room is kept for it; the format lets
spaces fill what is left. Data is flushed to disk while more is made, so that little is left to
wait for at the end, and a file gets its name when all of it is on disk.
"""

import os
import queue
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from emp_llm.geometry import Block, Geometry, write_all
from emp_llm.safetensors_header import encode_header

__all__ = ["Flusher", "ShardWriter"]

_FLUSH_EVERY = 256 << 20
_UNFINISHED = ".partial"

Entry = tuple[str, str, tuple[int, ...], int]
"""Name, dtype, shape and bytes of a tensor."""


class Flusher:
    """A thread that waits for the disk, so that the threads that compute need not.

    Leaving its ``with`` block waits until everything handed to it is done, and raises the first
    OSError that came of it.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._failure: OSError | None = None
        self._thread = threading.Thread(target=self._run, name="emp-flush", daemon=True)

    def __enter__(self) -> "Flusher":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._jobs.put(None)
        self._thread.join()
        if error is None:
            self.check()

    def submit(self, job: Callable[[], None]) -> None:
        """Do a job after the ones submitted before."""
        self._jobs.put(job)

    def check(self) -> None:
        """Raise the first OSError of a job, if there was one."""
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except OSError as error:
                self._failure = self._failure or error


class ShardWriter:
    """Writes one safetensors file.

    Offsets are given out by `allot`, from one thread at a time, and written to from any thread.

    Args:
        path: The file; it has this name once it is complete and on disk, not before.
        at_most: Name, dtype, shape and bytes of its tensors, none smaller than they will be:
            they set the room for the header.
        metadata: Its header's metadata.
        flusher: The thread that flushes it.
    """

    def __init__(
        self, path: Path, at_most: Iterable[Entry], metadata: Mapping[str, str], flusher: Flusher
    ) -> None:
        self._path = path
        self._partial = path.with_name(path.name + _UNFINISHED)
        self._metadata = metadata
        self._flusher = flusher
        self._reserved = len(encode_header(at_most, metadata))
        self._fd = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._lock = threading.Lock()
        self._entries: list[Entry] = []
        self._end = self._reserved
        self._unwritten = self._unflushed = 0
        self._closing = False

    @property
    def data_bytes(self) -> int:
        """Bytes of data allotted so far."""
        return self._end - self._reserved

    def allot(self, nbytes: int) -> int:
        """Make room behind what has been allotted; returns its offset in the file."""
        with self._lock:
            offset = self._end
            self._end += nbytes
            self._unwritten += nbytes
        return offset

    def add_entries(self, entries: Iterable[Entry]) -> None:
        """Tell of tensors, in the order of their room."""
        self._entries.extend(entries)

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Write to room that was allotted. OSErrors pass."""
        write_all(self._fd, offset, data)
        self._note_written(len(data))

    def write_rows(
        self,
        geometry: Geometry,
        offset: int,
        block: Block,
        weights: npt.NDArray[np.unsignedinteger],
    ) -> None:
        """Write a block of rows of a dense tensor whose room starts at offset. OSErrors pass."""
        geometry.write(self._fd, offset, block, weights)
        self._note_written(geometry.block_bytes(block))

    def _note_written(self, nbytes: int) -> None:
        self._flusher.check()
        with self._lock:
            self._unwritten -= nbytes
            self._unflushed += nbytes
            flush = self._unflushed >= _FLUSH_EVERY
            if flush:
                self._unflushed = 0
            # within the lock: no flush may come behind the end of the file
            if flush:
                self._flusher.submit(lambda: os.fdatasync(self._fd))
            if self._closing and not self._unwritten:
                self._flusher.submit(self._finish)

    def close_when_written(self) -> None:
        """No more is to be allotted: finish the file once all of its room is written to."""
        with self._lock:
            self._closing = True
            if not self._unwritten:
                self._flusher.submit(self._finish)

    def release(self) -> None:
        """Close the file if it was not finished; after the flusher has ended."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _finish(self) -> None:
        header = encode_header(self._entries, self._metadata, reserve=self._reserved)
        write_all(self._fd, 0, header)
        os.fsync(self._fd)
        self.release()
        self._partial.rename(self._path)
