"""One safetensors file, written tensor by tensor before the sizes of all tensors are known.

The header stands first in the file but is known last, so room is reserved for it; the format allows
spaces to fill what is left. The file gets its name when all of it is on disk.
"""

import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from emp_kernels.rows import Bytes

from emp_llm.checkpoint.safetensors_header import encode_header
from emp_llm.files.atomic import unfinished_path
from emp_llm.files.direct_file import Flusher, open_disk_file
from emp_llm.tensors.geometry import Geometry, RowBlock

__all__ = ["Entry", "ShardWriter"]

Entry = tuple[str, str, tuple[int, ...], int]
"""Name, dtype as safetensors spells it, shape and bytes of a tensor."""


class ShardWriter:
    """Writes one safetensors file.

    Places in the file are given out by `allot`, from one thread at a time, and written from any
    thread.

    Args:
        path: The file; it has this name once it is complete and on disk, not before.
        at_most: Entries of its tensors, with sizes that the final ones do not exceed: they
            determine how much room the header gets.
        metadata: Its header's metadata.
        flusher: The thread that waits for the disk.
        in_order: Whether places are written roughly in the order in which they are given out.
        finished: Called from the flusher's thread when the file has its name.

    Raises:
        OSError: If the file cannot be made.
    """

    def __init__(
        self,
        path: Path,
        at_most: Iterable[Entry],
        metadata: Mapping[str, str],
        flusher: Flusher,
        *,
        in_order: bool,
        finished: Callable[[], None] = lambda: None,
    ) -> None:
        self._path = path
        self._finished = finished
        self._unfinished = unfinished_path(path)
        self._metadata = metadata
        self._flusher = flusher
        self._reserved = len(encode_header(at_most, metadata))
        self._file = open_disk_file(
            self._unfinished, flusher, head_bytes=self._reserved, in_order=in_order
        )
        self._lock = threading.Lock()
        self._entries: list[Entry] = []
        self._end = self._reserved
        self._unwritten = 0
        self._closing = self._complete = False

    def allot(self, nbytes: int) -> int:
        """Give out the next bytes of the file; returns their offset."""
        with self._lock:
            offset = self._end
            self._end += nbytes
            self._unwritten += nbytes
        return offset

    def add_entries(self, entries: Iterable[Entry]) -> None:
        """Add tensors to the header, in the order of their places."""
        self._entries.extend(entries)

    def write(self, offset: int, data: Bytes) -> None:
        """Write uint8 data to a place that was given out.

        Raises:
            OSError: If it cannot be written.
        """
        self._file.write(offset, data)
        self._note(written=data.size)

    def write_rows(
        self,
        geometry: Geometry,
        offset: int,
        block: RowBlock,
        weights: npt.NDArray[np.unsignedinteger],
    ) -> None:
        """Write a row block of a dense tensor.

        Args:
            geometry: How the tensor's rows run.
            offset: The place of the whole tensor, from `allot`.
            block: The rows.
            weights: Their bit patterns, [R, C].

        Raises:
            OSError: If they cannot be written.
        """
        for at, data in geometry.placed(offset, block, weights):
            self.write(at, data)

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
        self._file.finish(encode_header(self._entries, self._metadata, reserve=self._reserved))
        self._unfinished.rename(self._path)
        self._finished()
