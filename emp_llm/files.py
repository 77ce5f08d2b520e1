"""Files of a checkpoint, opened once and closed together."""

import os
from pathlib import Path

from emp_llm.errors import CheckpointError

__all__ = ["OpenFiles"]


class OpenFiles:
    """Source files open for reading, until the end of a ``with`` block."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, *_error: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def fd(self, path: Path) -> int:
        """The descriptor of a file, opened when it is first asked for. From one thread at a time.

        Raises:
            CheckpointError: If it cannot be opened.
        """
        if path not in self._descriptors:
            try:
                self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
        return self._descriptors[path]
