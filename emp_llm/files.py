"""Files of a checkpoint, opened once and closed together."""

import os
import threading
from pathlib import Path

from emp_llm.errors import CheckpointError

__all__ = ["OpenFiles"]


class OpenFiles:
    """Source files open for reading, until the end of a ``with`` block. For any thread."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._opening = threading.Lock()

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, *_error: object) -> None:
        for path in list(self._descriptors):
            self._close(path)

    def fd(self, path: Path) -> int:
        """The descriptor of a file, opened when it is first asked for.

        Raises:
            CheckpointError: If it cannot be opened.
        """
        with self._opening:
            if path not in self._descriptors:
                try:
                    self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                except OSError as error:
                    raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
            return self._descriptors[path]

    def done(self, path: Path) -> None:
        """No more is to be read of a file that was opened: close it."""
        self._close(path)

    def abandon(self) -> None:
        """The work has failed: let nobody wait for a file any longer."""

    def _close(self, path: Path) -> None:
        with self._opening:
            os.close(self._descriptors.pop(path))
