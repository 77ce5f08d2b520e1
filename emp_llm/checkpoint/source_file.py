"""A file of weights that is open for reading."""

import os
from abc import ABC, abstractmethod
from pathlib import Path

from emp_llm.checkpoint.regular_file import open_regular
from emp_llm.errors import CheckpointError, SourceReadError

__all__ = ["PlainFile", "SourceFile"]


class SourceFile(ABC):
    """A file of weights that is open for reading, from any thread.

    Attributes:
        name: Its name, for errors.
    """

    name: str

    @abstractmethod
    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from an offset on.

        Raises:
            CheckpointError: If they cannot be read or the file ends early.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the file."""


class PlainFile(SourceFile):
    """A file on disk, read as it is.

    Args:
        path: Its path.

    Raises:
        CheckpointError: If it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        try:
            self._file = open_regular(path)
        except OSError as error:
            raise SourceReadError(f"{path}: cannot be read: {error.strerror}") from error

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from an offset on."""
        filled = 0
        while filled < len(buffer):
            try:
                count = os.preadv(self._file.fileno(), [buffer[filled:]], offset + filled)
            except OSError as error:
                raise SourceReadError(
                    f"{self.name}: reading at byte {offset + filled:,} failed: {error.strerror}"
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"{self.name}: ends too early, at byte {offset + filled:,}: it changed while "
                    "it was read; leave it alone and start again"
                )
            filled += count

    def close(self) -> None:
        """Close the file."""
        self._file.close()
