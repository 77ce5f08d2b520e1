"""Files of a checkpoint, opened once and closed together."""

import threading
from pathlib import Path

from emp_llm.checkpoint.shard import Shard
from emp_llm.checkpoint.source_file import SourceFile

__all__ = ["OpenFiles"]


class OpenFiles:
    """Source files open for reading, until the end of a ``with`` block. For any thread."""

    def __init__(self) -> None:
        self._open: dict[Path, SourceFile] = {}
        self._opening = threading.Lock()

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, *_error: object) -> None:
        for path in list(self._open):
            self._close(path)

    def file(self, shard: Shard) -> SourceFile:
        """A shard's file, opened when it is first asked for.

        Raises:
            CheckpointError: If it cannot be opened.
        """
        with self._opening:
            if shard.path not in self._open:
                self._open[shard.path] = shard.open()
            return self._open[shard.path]

    def done(self, shard: Shard) -> None:
        """No more is to be read of a shard that was opened: close its file."""
        self._close(shard.path)

    def abandon(self) -> None:
        """The work has failed: let nobody wait for a file any longer."""

    def _close(self, path: Path) -> None:
        with self._opening:
            self._open.pop(path).close()
