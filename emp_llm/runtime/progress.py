"""What long work tells of itself while it goes on."""

import threading
from typing import Protocol

__all__ = ["Progress", "SharedProgress", "Silent"]


class Progress(Protocol):
    """Told of stages of work and of their advance, by one thread at a time."""

    def begin(self, stage: str, total: int, unit: str = "B") -> None:
        """A stage begins, of so many bytes or of what else is counted, named in the plural."""

    def advance(self, count: int) -> None:
        """So many bytes, or what is counted in their place, of the stage are done."""


class Silent:
    """Progress that nobody sees."""

    def begin(self, stage: str, total: int, unit: str = "B") -> None:
        """Nothing."""

    def advance(self, count: int) -> None:
        """Nothing."""


class SharedProgress:
    """Progress of work and of the download that goes on beside it, each on threads of its own.

    A stage counts the bytes of both.

    Args:
        progress: Told of it, by one thread at a time.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._to_fetch = 0
        self._counts_bytes = True

    def expect(self, nbytes: int) -> None:
        """So many bytes are to be fetched during the stages that will begin."""
        self._to_fetch += nbytes

    def begin(self, stage: str, total: int, unit: str = "B") -> None:
        """A stage of the work begins; what is still to be fetched is added to one of bytes."""
        with self._lock:
            self._counts_bytes = unit == "B"
            if self._to_fetch and self._counts_bytes:
                stage, total = f"fetching and {stage}", total + self._to_fetch
            if self._counts_bytes:
                self._progress.begin(stage, total)
            else:
                self._progress.begin(stage, total, unit)

    def advance(self, nbytes: int) -> None:
        """So many bytes of the stage are done."""
        with self._lock:
            self._progress.advance(nbytes)

    def fetched(self, nbytes: int) -> None:
        """So many of the expected bytes are there; fewer than none where some were lost."""
        with self._lock:
            self._to_fetch -= nbytes
            if self._counts_bytes:
                self._progress.advance(nbytes)
