"""Progress of long work, reported while it runs."""

import threading
from typing import Protocol

__all__ = ["Progress", "SharedProgress", "Silent"]


class Progress(Protocol):
    """Shows how far work is; called by one thread at a time."""

    def begin(self, stage: str, total: int, unit: str = "B") -> None:
        """A stage of the work begins.

        Args:
            stage: What is done, such as "pruning".
            total: What the calls of `advance` add up to.
            unit: What is counted: "B" for bytes, or a word in the plural, such as "blocks".
        """

    def advance(self, count: int) -> None:
        """More of the stage is done.

        Args:
            count: How much more; less than 0 where something has to be done again.
        """


class Silent:
    """Progress that is not shown."""

    def begin(self, stage: str, total: int, unit: str = "B") -> None:
        """Do nothing."""

    def advance(self, count: int) -> None:
        """Do nothing."""


class SharedProgress:
    """Progress of work and of the download that goes on beside it, each on threads of its own.

    A stage counts the bytes of both.

    Args:
        progress: Shows both, called by one thread at a time.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._to_fetch = 0
        self._counts_bytes = True

    def expect(self, nbytes: int) -> None:
        """Announce bytes to be fetched during the stages that will begin."""
        self._to_fetch += nbytes

    def begin(self, stage: str, total: int, unit: str = "B") -> None:
        """A stage begins; if it counts bytes, those still to be fetched are added to it."""
        with self._lock:
            self._counts_bytes = unit == "B"
            if self._to_fetch and self._counts_bytes:
                stage, total = f"fetching and {stage}", total + self._to_fetch
            if self._counts_bytes:
                self._progress.begin(stage, total)
            else:
                self._progress.begin(stage, total, unit)

    def advance(self, nbytes: int) -> None:
        """More of the stage is done."""
        with self._lock:
            self._progress.advance(nbytes)

    def fetched(self, nbytes: int) -> None:
        """Expected bytes have been fetched; less than 0 where some were lost again."""
        with self._lock:
            self._to_fetch -= nbytes
            if self._counts_bytes:
                self._progress.advance(nbytes)
