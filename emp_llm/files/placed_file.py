"""A file whose places are given out in order and written by many threads.

It gets its name when all of it is on disk.
"""

import threading
from collections.abc import Callable
from pathlib import Path

from emp_kernels.rows import Bytes

from emp_llm.files.atomic import unfinished_path
from emp_llm.files.direct_file import Flusher, open_disk_file

__all__ = ["PlacedFile"]


class PlacedFile:
    """A file being written.

    Places in it are given out by `allot`, from one thread at a time, and written from any thread.

    Args:
        path: The file; it has this name once it is complete and on disk, not before.
        flusher: The thread that waits for the disk.
        head_bytes: Bytes at the beginning that are written last, see `head`.
        in_order: Whether places are written roughly in the order in which they are given out.
        finished: Called from the flusher's thread when the file has its name.

    Raises:
        OSError: If the file cannot be made.
    """

    def __init__(
        self,
        path: Path,
        flusher: Flusher,
        *,
        head_bytes: int = 0,
        in_order: bool = True,
        finished: Callable[[], None] = lambda: None,
    ) -> None:
        self._path = path
        self._finished = finished
        self._unfinished = unfinished_path(path)
        self._flusher = flusher
        self._file = open_disk_file(
            self._unfinished, flusher, head_bytes=head_bytes, in_order=in_order
        )
        self._lock = threading.Lock()
        self._end = head_bytes
        self._unwritten = 0
        self._closing = self._complete = False

    def head(self) -> bytes:
        """The bytes at the beginning of the file; asked for once all others are written."""
        return b""

    def allot(self, nbytes: int) -> int:
        """Give out the next bytes of the file; returns their offset."""
        with self._lock:
            offset = self._end
            self._end += nbytes
            self._unwritten += nbytes
        return offset

    def write(self, offset: int, data: Bytes) -> None:
        """Write uint8 data to a place that was given out.

        Raises:
            OSError: If it cannot be written.
        """
        self._file.write(offset, data)
        self._note(written=data.size)

    def close_when_written(self) -> None:
        """Finish the file once all places are written; no more are given out."""
        self._note(closing=True)

    def release(self) -> None:
        """Close the file if it was not finished; to be called after the flusher has ended."""
        self._file.close()

    def _note(self, *, written: int = 0, closing: bool = False) -> None:
        with self._lock:
            self._unwritten -= written
            self._closing |= closing
            complete = self._closing and not self._unwritten and not self._complete
            self._complete |= complete
        if complete:
            self._flusher.submit(self._finish)

    def _finish(self) -> None:
        self._file.finish(self.head())
        self._unfinished.rename(self._path)
        self._finished()
