"""Shards that arrive from the Hub one after the other, while those before them are worked on."""

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
"""Seconds that a download gets to end by itself once it is not wanted any more."""


class Arrivals(OpenFiles):
    """Files of shards, some of which are still to be fetched.

    A thread fetches them in their order, from when the first file is asked for. Leaving the
    ``with`` block stops it; what it has fetched stays in the cache.

    Args:
        repository: Where from.
        shards: The shards, in the order in which they are worked on.
        missing: Names of the files that are to be fetched for them.
        discard: Whether what was fetched is deleted when it is done with. No more than `IN_WORK`
            of these shards are then on disk at once.
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
            if self._thread.is_alive():
                _remove_unfinished(self._shards[0].path.parent.parent.parent / "blobs")
        super().__exit__(*error)

    def file(self, shard: Shard) -> SourceFile:
        """A shard's file; waits until it is there.

        Raises:
            HubError: If a file could not be fetched.
            CheckpointError: If it cannot be opened.
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
        """No more is to be read of a shard: close its file, and delete it if that was asked for.

        Raises:
            HubError: If it cannot be deleted.
        """
        super().done(shard)
        self._left.subtract(shard.files)
        for path in shard.files:
            if self._discard and path in self._ours and not self._left[path]:
                discard_file(path)
        with self._changed:
            self._in_work.discard(shard.path)
            self._changed.notify_all()

    def abandon(self) -> None:
        """Stop fetching, and let nobody wait any longer."""
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
        except BaseException as failure:  # file raises it again
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
    """Remove the unfinished file of a download that hangs in the network, in this process.

    If the process ends now, nobody else does.
    """
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # it is closed meanwhile, or what it leads to is gone
            path = descriptor.readlink()
            if path.suffix == ".incomplete" and path.parent == blobs.resolve():
                path.unlink()
