"""Reads only the targets of shards on the Hub, by byte ranges, and keeps nothing.

What will be read, and in which order, is known from the start. So several requests run at once,
ahead of the work, with no more than a fixed amount in memory, except for what the work waits for.
"""

import threading
import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence

from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.shard import Shard
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.hub.download_errors import DownloadStoppedError
from emp_llm.hub.repository import Repository
from emp_llm.tensors.read_order import Span

__all__ = ["RangeFiles"]


_REQUESTS = 8
"""How many run at once: enough that bandwidth limits the speed, rather than latency."""

_MEMORY_BYTES = 96 << 20
"""Bytes of spans that have arrived or are being downloaded."""

_PATIENCE = 0.5
"""Seconds to wait for requests to end once they are not needed any more."""


class RangeFiles(OpenFiles):
    """Files of shards, of some of which only spans are downloaded, ahead of being read.

    Leaving the ``with`` block stops the downloads.

    Args:
        repository: The repository to download from.
        wanted: The spans, in about the order in which they will be read. Nothing else of their
            shards can be read. All other shards are in the cache.
    """

    def __init__(self, repository: Repository, wanted: Iterable[Span]) -> None:
        super().__init__()
        self._repository = repository
        self._spans = list(wanted)
        self._changed = threading.Condition()
        self._numbers = {span: number for number, span in enumerate(self._spans)}
        self._next = self._held = 0
        self._awaited: list[int] = []  # the numbers of spans that a thread waits for
        self._failure: BaseException | None = None
        self._stopped = False
        self._files: dict[str, _RangeFile] = {}
        by_shard: dict[str, list[Span]] = {}
        for span in self._spans:
            by_shard.setdefault(span.shard.name, []).append(span)
        for name, parts in by_shard.items():
            self._files[name] = _RangeFile(name, self, parts)
        self._hub_files = {
            name: repository.file(name, parts[0].shard.header.file_size)
            for name, parts in by_shard.items()
        }
        repository.expect(sum(span.nbytes for span in self._spans))
        self._threads: list[threading.Thread] = []

    def __exit__(self, *error: object) -> None:
        self.abandon()
        end = time.monotonic() + _PATIENCE
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        super().__exit__(*error)

    def file(self, shard: Shard) -> SourceFile:
        """The file of a shard; the first call starts the downloads."""
        with self._changed:
            if not self._threads:
                self._threads = [
                    threading.Thread(target=self._fetch, name=f"emp-range-{i}", daemon=True)
                    for i in range(_REQUESTS)
                ]
                for thread in self._threads:
                    thread.start()
        return self._files.get(shard.name) or super().file(shard)

    def done(self, shard: Shard) -> None:
        """Close the file of a shard, of which no more will be read."""
        if shard.name not in self._files:
            super().done(shard)

    def abandon(self) -> None:
        """Stop the downloads, and end all waiting for them."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def take(self, span: Span, start: int, buffer: memoryview) -> None:
        """Fill a buffer from a span, after waiting until all of it has arrived.

        Args:
            span: One of the spans.
            start: Offset of the first byte, in the shard.
            buffer: Not longer than what the span has from there on.

        Raises:
            HubError: If any span could not be downloaded.
            DownloadStoppedError: If the downloads were stopped.
        """
        with self._changed:
            self._awaited.append(self._numbers[span])
            self._changed.notify_all()
            self._changed.wait_for(lambda: span.arrived or self._failure or self._stopped)
            self._awaited.remove(self._numbers[span])
            if self._failure is not None:
                raise self._failure
            if not span.arrived or span.data is None:
                raise DownloadStoppedError
            data = memoryview(span.data)
        buffer[:] = data[start - span.start : start - span.start + len(buffer)]
        with self._changed:
            span.left -= len(buffer)
            if span.left <= 0:
                span.data = None
                self._held -= span.nbytes
                self._changed.notify_all()

    def _fetch(self) -> None:
        try:
            while (claimed := self._claim()) is not None:
                span, data = claimed
                file = self._hub_files[span.shard.name]
                file.read_into(span.start, memoryview(data), stopped=lambda: self._stopped)
                self._repository.fetched(span.nbytes)
                with self._changed:
                    span.arrived = True
                    self._changed.notify_all()
        except DownloadStoppedError:
            pass
        except BaseException as failure:  # take() raises it again, in the thread that waits
            with self._changed:
                self._failure = self._failure or failure
                self._stopped = True
                self._changed.notify_all()

    def _claim(self) -> tuple[Span, bytearray] | None:
        """The next span to fetch and room for its data, once there is any; None after the last."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._has_room())
            if self._stopped or self._next == len(self._spans):
                return None
            span = self._spans[self._next]
            self._next += 1
            self._held += span.nbytes
            span.data = bytearray(span.nbytes)
            return span, span.data

    def _has_room(self) -> bool:
        if self._next == len(self._spans) or not self._held:
            return True
        # All threads may wait for spans behind those that fill the memory, such as the samples,
        # which come first. Then one more must be downloaded, or they would wait forever.
        if self._next <= min(self._awaited, default=-1):
            return True
        return self._held + self._spans[self._next].nbytes <= _MEMORY_BYTES


class _RangeFile(SourceFile):
    """A shard of which spans are downloaded."""

    def __init__(self, name: str, files: RangeFiles, parts: Sequence[Span]) -> None:
        self.name = name
        self._files = files
        self._exact: dict[tuple[int, int], list[Span]] = {}
        for span in parts:  # a sampled row may also be a whole row block: the same range twice
            self._exact.setdefault((span.start, span.stop), []).append(span)
        self._choosing = threading.Lock()
        self._parts = sorted(parts, key=lambda span: span.start)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer from the span of exactly this range, or else from one that holds it.

        If there are several of exactly this range, each is read once.
        """
        stop = offset + len(buffer)
        with self._choosing:
            exact = self._exact.get((offset, stop), [])
            span = exact.pop(0) if len(exact) > 1 else next(iter(exact), None)
        if span is None:
            at = bisect_right(self._parts, offset, key=lambda span: span.start) - 1
            span = next(s for s in reversed(self._parts[: at + 1]) if stop <= s.stop)
        self._files.take(span, offset, buffer)

    def close(self) -> None:
        """Nothing is to be closed."""
