"""Shards that arrive from the Hub one after the other, while those before them are worked on."""

import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from emp_llm.checkpoint import Shard
from emp_llm.files import OpenFiles
from emp_llm.repository import IN_WORK, DownloadStoppedError, Repository
from emp_llm.source_file import SourceFile

__all__ = ["Arrivals"]

_PATIENCE = 0.5
"""Seconds that a download gets to end by itself once it is not wanted any more."""


class Arrivals(OpenFiles):
    """Files of shards, some of which are still to be fetched.

    A thread fetches them in their order, from when the first file is asked for. Leaving the
    ``with`` block stops it; what it has fetched stays in the cache.

    Args:
        repository: Where from.
        shards: The shards to fetch, in the order in which they are worked on.
        discard: Whether what was fetched is deleted when it is done with. No more than `IN_WORK`
            of these shards are then on disk at once.
    """

    def __init__(self, repository: Repository, shards: Sequence[Shard], *, discard: bool) -> None:
        super().__init__()
        self._repository = repository
        self._shards = shards
        self._discard = discard
        self._changed = threading.Condition()
        self._awaited = {shard.path for shard in shards}
        self._in_work: set[Path] = set()
        self._ours: set[Path] = set()
        self._failure: BaseException | None = None
        self._stopped = False
        self._thread: threading.Thread | None = None
        repository.expect(shards)

    def __exit__(self, *error: object) -> None:
        self.abandon()
        if self._thread is not None and self._awaited:
            _abort_xet()
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
                lambda: shard.path not in self._awaited or self._failure or self._stopped
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
        if self._discard and shard.path in self._ours:
            self._repository.discard(shard.path)
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
                if self._repository.download(shard, lambda: self._stopped):
                    self._ours.add(shard.path)
                with self._changed:
                    self._awaited.discard(shard.path)
                    self._changed.notify_all()
        except BaseException as failure:  # file raises it again
            with self._changed:
                self._failure = failure
                self._changed.notify_all()

    def _has_room(self) -> bool:
        return not self._discard or len(self._in_work) < IN_WORK


def _abort_xet() -> None:
    """End what hf_xet downloads, which heeds nothing else."""
    if "hf_xet" in sys.modules:
        from huggingface_hub.utils._xet import abort_xet_session

        abort_xet_session()  # type: ignore[no-untyped-call]


def _remove_unfinished(blobs: Path) -> None:
    """Remove the unfinished file of a download that hangs in the network, in this process.

    If the process ends now, nobody else does.
    """
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # it is closed meanwhile, or what it leads to is gone
            path = descriptor.readlink()
            if path.suffix == ".incomplete" and path.parent == blobs.resolve():
                path.unlink()
