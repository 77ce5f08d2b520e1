"""A file that many threads write, out of order, and that is on disk when it is finished.

Where the file system allows direct I/O, large aligned chunks go from memory to disk, past the page
cache, while more is computed. That spares the copy into the cache and the wait for it to be
flushed, and leaves the cache to the source. Elsewhere the file is written through the cache.
"""

import errno
import mmap
import os
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import TracebackType

import numpy as np
from emp_kernels.rows import Bytes

__all__ = ["CHUNK_BYTES", "DiskFile", "Flusher", "open_disk_file"]

CHUNK_BYTES = 4 << 20
"""Bytes that go to disk at a time; a multiple of every file system's block."""

_O_DIRECT: int = getattr(os, "O_DIRECT", 0)
_QUEUED = 16
_FLUSH_EVERY = 256 << 20


class Flusher:
    """A thread that waits for the disk, so that the threads that compute need not.

    Leaving its ``with`` block waits until all of its jobs are done, and raises the first error of
    one. If the block is left by an error, jobs that have not begun are dropped.
    """

    def __init__(self) -> None:
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=_QUEUED)
        self._failure: Exception | None = None
        self._dropping = False
        self._thread = threading.Thread(target=self._run, name="emp-flush", daemon=True)
        self._spare: queue.SimpleQueue[Bytes] = queue.SimpleQueue()

    def __enter__(self) -> "Flusher":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._dropping = error is not None
        self._jobs.put(None)
        self._thread.join()
        if error is None:
            self.check()

    def submit(self, job: Callable[[], None]) -> None:
        """Do a job after the ones submitted before; waits while too many are queued."""
        self.check()
        self._jobs.put(job)

    def check(self) -> None:
        """Raise the first error of a job, if there was one."""
        if self._failure is not None:
            raise self._failure

    def take_chunk(self) -> Bytes:
        """An aligned buffer of CHUNK_BYTES; what it holds is unspecified."""
        try:
            return self._spare.get_nowait()
        except queue.Empty:
            return np.frombuffer(mmap.mmap(-1, CHUNK_BYTES), np.uint8)

    def give_back(self, chunk: Bytes) -> None:
        """Return a buffer, to be taken again."""
        self._spare.put(chunk)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._dropping or self._failure is not None:
                continue
            try:
                job()
            except Exception as error:  # `check` raises it in the thread that hands out the jobs
                self._failure = error


class DiskFile(ABC):
    """A file being written. `write` may be called from any thread.

    Args:
        path: The file, which must not be there yet.
        flusher: The thread that waits for the disk.
    """

    def __init__(self, path: Path, flusher: Flusher) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._fd = os.open(path, flags, 0o666)
        self._flusher = flusher
        self._lock = threading.Lock()

    @abstractmethod
    def write(self, offset: int, data: Bytes) -> None:
        """Write uint8 data at an offset; no byte of the file is written twice.

        Raises:
            OSError: If it cannot be written, or an earlier job of the flusher failed.
        """

    def finish(self, head: bytes) -> None:
        """Write the beginning of the file, and wait until all of it is on disk.

        To be called from the flusher's thread, when everything behind the head is written.
        """
        _write_all(self._fd, 0, head)
        os.fsync(self._fd)
        self.close()

    def close(self) -> None:
        """Close the file, finished or not; after the flusher has ended, or from its thread."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class _CachedFile(DiskFile):
    """Written through the page cache, and flushed as it grows."""

    def __init__(self, path: Path, flusher: Flusher) -> None:
        super().__init__(path, flusher)
        self._unflushed = 0

    def write(self, offset: int, data: Bytes) -> None:
        _write_all(self._fd, offset, data.data)
        with self._lock:
            self._unflushed += data.size
            flush = self._unflushed >= _FLUSH_EVERY
            if flush:
                self._unflushed = 0
        if flush:
            self._flusher.submit(self._flush)

    def _flush(self) -> None:
        os.fsync(self._fd)


class _DirectFile(DiskFile):
    """Gathered in aligned chunks, which go to disk past the page cache once they are full.

    Only for data that comes roughly in order: all chunks that are not full are in memory.

    Args:
        path: The file, which must not be there yet.
        flusher: The thread that writes the chunks.
        head_bytes: Bytes at the beginning that `finish` will write.
    """

    def __init__(self, path: Path, flusher: Flusher, head_bytes: int) -> None:
        super().__init__(path, flusher)
        self._direct = -1
        try:
            self._direct = os.open(path, os.O_WRONLY | _O_DIRECT | os.O_CLOEXEC)
        except OSError:
            self.close()
            path.unlink()
            raise
        self._chunks: dict[int, Bytes] = {}
        self._head_chunks, rest = divmod(head_bytes, CHUNK_BYTES)
        # the head counts as there in its last chunk, so that data fills that chunk; `finish` puts
        # it on disk
        self._filled = {self._head_chunks: rest}

    def write(self, offset: int, data: Bytes) -> None:
        while data.size:
            number, start = divmod(offset, CHUNK_BYTES)
            part = data[: CHUNK_BYTES - start]
            with self._lock:
                chunk = self._chunks.get(number)
                if chunk is None:
                    chunk = self._chunks[number] = self._flusher.take_chunk()
            chunk[start : start + part.size] = part
            with self._lock:
                filled = self._filled[number] = self._filled.get(number, 0) + part.size
            if filled == CHUNK_BYTES:
                self._flusher.submit(partial(self._write_chunk, number))
            data, offset = data[part.size :], offset + part.size

    def finish(self, head: bytes) -> None:
        for number, chunk in self._chunks.items():  # the last one, which is not full
            start = len(head) % CHUNK_BYTES if number == self._head_chunks else 0
            end = self._filled[number]
            _write_all(self._fd, number * CHUNK_BYTES + start, chunk[start:end].data)
            self._flusher.give_back(chunk)
        self._chunks.clear()
        super().finish(head)

    def close(self) -> None:
        super().close()
        if self._direct >= 0:
            os.close(self._direct)
            self._direct = -1

    def _write_chunk(self, number: int) -> None:
        with self._lock:
            chunk = self._chunks.pop(number)
        try:
            _write_all(self._direct, number * CHUNK_BYTES, chunk.data)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            # some file systems open files for direct I/O, and then demand larger alignments
            _write_all(self._fd, number * CHUNK_BYTES, chunk.data)
        self._flusher.give_back(chunk)


def open_disk_file(path: Path, flusher: Flusher, *, head_bytes: int, in_order: bool) -> DiskFile:
    """Make a file to write.

    Args:
        path: The file, which must not be there yet.
        flusher: The thread that waits for the disk.
        head_bytes: Bytes at the beginning that `DiskFile.finish` writes, last.
        in_order: Whether the data comes roughly in order.

    Raises:
        OSError: If the file cannot be made.
    """
    if in_order and _O_DIRECT:
        try:
            return _DirectFile(path, flusher, head_bytes)
        except OSError as error:
            if error.errno != errno.EINVAL:  # else this file system has no direct I/O
                raise
    return _CachedFile(path, flusher)


def _write_all(fd: int, offset: int, data: memoryview | bytes) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
