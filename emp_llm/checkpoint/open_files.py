"""The files of a checkpoint's shards, opened once and closed together."""

import threading
from pathlib import Path

from emp_llm.checkpoint.shard import Shard
from emp_llm.checkpoint.source_file import SourceFile

__all__ = ["OpenFiles"]


class OpenFiles:
    """The files of shards, open for reading until the end of a ``with`` block; for any thread."""

    def __init__(self) -> None:
        self._open: dict[Path, SourceFile] = {}
        self._opening = threading.Lock()

    def __enter__(self) -> "OpenFiles":
        return self

    def __exit__(self, *_error: object) -> None:
        for path in list(self._open):
            self._close(path)

    def file(self, shard: Shard) -> SourceFile:
        """The file of a shard, opened at the first call.

        Raises:
            CheckpointError: If it cannot be opened.
        """
        with self._opening:
            if shard.path not in self._open:
                self._open[shard.path] = shard.open()
            return self._open[shard.path]

    def done(self, shard: Shard) -> None:
        """Close the file of a shard, of which no more will be read."""
        self._close(shard.path)

    def abandon(self) -> None:
        """End all waiting for files, because the work has failed. These are never waited for."""

    def _close(self, path: Path) -> None:
        with self._opening:
            self._open.pop(path).close()
