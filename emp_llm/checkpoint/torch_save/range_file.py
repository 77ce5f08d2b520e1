"""A file object over byte ranges, for the readers of the standard library."""

import os

from emp_llm.checkpoint.header import DOWNLOAD_AGAIN, ReadRange, UnreadableError

__all__ = ["RangeFile"]

_MAX_READ_BYTES = 16 << 20
_LINE = 128


class RangeFile:
    """As much of a binary file as zipfile and pickletools use.

    Args:
        read: Reads a range of the file.
        stop: Where the file ends, or what is to be seen of it.
    """

    def __init__(self, read: ReadRange, stop: int) -> None:
        self._read, self._stop, self._at = read, stop, 0

    def seekable(self) -> bool:
        """It is: zipfile asks."""
        return True

    def tell(self) -> int:
        """Where the next read starts."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to an offset, from the start, from here or from the end.

        Raises:
            UnreadableError: If that is before the start, as a damaged directory may ask for.
        """
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._stop}[whence]
        if base + offset < 0:
            raise UnreadableError(f"has a damaged directory; {DOWNLOAD_AGAIN}")
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Up to so many bytes, or all that are left.

        Raises:
            UnreadableError: If these are more than any directory or pickle that is read.
        """
        left = max(0, self._stop - self._at)
        count = left if size < 0 else min(size, left)
        if count > _MAX_READ_BYTES:
            raise UnreadableError(f"has a directory of {count:,} bytes; {DOWNLOAD_AGAIN}")
        data = self._read(self._at, self._at + count)
        self._at += len(data)
        return data

    def readline(self) -> bytes:
        """The bytes up to the end of a line, that included; the names in a pickle are lines."""
        start, line = self._at, bytearray()
        while more := self.read(_LINE):
            stop = more.find(b"\n") + 1
            line += more[: stop or None]
            if stop:
                break
        self._at = start + len(line)
        return bytes(line)
