"""Downloads shards one after the other while those before them are in use."""

import sys
import threading
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.shard import Shard
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.hub.cached_files import discard_file
from emp_llm.hub.download_errors import DownloadStoppedError
from emp_llm.hub.hub_library import abort_xet
from emp_llm.hub.repository import IN_WORK, Repository

__all__ = ["Arrivals"]

_PATIENCE = 0.5
"""Seconds to wait for a download to end by itself once it is not needed any more."""


class Arrivals(OpenFiles):
    """Files of shards, some of which are still to be downloaded.

    A thread downloads them in their order, once the first file is asked for. Leaving the ``with``
    block stops it; what it has downloaded stays in the cache.

    Args:
        repository: The repository to download from.
        shards: The shards, in the order in which they are used.
        missing: Names of their files that are to be downloaded.
        discard: Whether downloaded files are deleted after use. Then no more than `IN_WORK` of
            these shards are on disk at once.
    """

    def __init__(
        self,
        repository: Repository,
        shards: Sequence[Shard],
        missing: Collection[str],
        *,
        discard: bool,
    ) -> None:
        super().__init__()
        self._repository = repository
        self._shards = shards
        self._discard = discard
        self._changed = threading.Condition()
        parts = {part.path: part for s in shards for part in s.parts if part.name in missing}
        self._awaited = set(parts)
        self._left = Counter(part.path for shard in shards for part in shard.parts)
        self._in_work: set[Path] = set()
        self._ours: set[Path] = set()
        self._failure: BaseException | None = None
        self._stopped = False
        self._thread: threading.Thread | None = None
        repository.expect(sum(part.header.file_size for part in parts.values()))

    def __exit__(self, *error: object) -> None:
        self.abandon()
        if self._thread is not None and self._awaited:
            if "hf_xet" in sys.modules:
                abort_xet()
            self._thread.join(_PATIENCE)
            if self._thread.is_alive():  # it waits for the network, maybe for a minute more
                _remove_unfinished(self._shards[0].path.parent.parent.parent / "blobs")
        super().__exit__(*error)

    def file(self, shard: Shard) -> SourceFile:
        """The file of a shard, after waiting until it is downloaded.

        Raises:
            HubError: If any file could not be downloaded.
            CheckpointError: If it cannot be opened.
            DownloadStoppedError: If the downloads were stopped.
        """
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._fetch, name="emp-fetch", daemon=True)
                self._thread.start()
            self._changed.wait_for(
                lambda: self._awaited.isdisjoint(shard.files) or self._failure or self._stopped
            )
            if self._failure is not None:
                raise self._failure
            if self._stopped:
                raise DownloadStoppedError
        return super().file(shard)

    def done(self, shard: Shard) -> None:
        """Close the file of a shard, of which no more will be read; delete it if asked for.

        Raises:
            HubError: If it cannot be deleted.
        """
        super().done(shard)
        self._left.subtract(shard.files)
        for path in shard.files:  # a part of Meta's belongs to several shards
            if self._discard and path in self._ours and not self._left[path]:
                discard_file(path)
        with self._changed:
            self._in_work.discard(shard.path)
            self._changed.notify_all()

    def abandon(self) -> None:
        """Stop the downloads, and end all waiting for them."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def _fetch(self) -> None:
        try:
            for shard in self._shards:
                with self._changed:
                    self._changed.wait_for(lambda: self._has_room() or self._stopped)
                    if self._stopped:
                        return
                    self._in_work.add(shard.path)
                for part in shard.parts:
                    self._fetch_part(part)
        except BaseException as failure:  # file() raises it again, in the thread that waits
            with self._changed:
                self._failure = failure
                self._changed.notify_all()

    def _fetch_part(self, part: Shard) -> None:
        if part.path not in self._awaited:
            return
        if self._repository.download(part, lambda: self._stopped):
            self._ours.add(part.path)
        with self._changed:
            self._awaited.discard(part.path)
            self._changed.notify_all()

    def _has_room(self) -> bool:
        return not self._discard or len(self._in_work) < IN_WORK


def _remove_unfinished(blobs: Path) -> None:
    """Remove the unfinished file of a download that does not end because the network hangs.

    Otherwise it would stay in the cache once this process has ended. The files that this process
    has open show which one it is.
    """
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # closed or removed meanwhile
            path = descriptor.readlink()
            if path.suffix == ".incomplete" and path.parent == blobs.resolve():
                path.unlink()
