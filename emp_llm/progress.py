"""What long work tells of itself while it goes on."""

from typing import Protocol

__all__ = ["Progress", "Silent"]


class Progress(Protocol):
    """Told of stages of work and of their advance, by one thread at a time."""

    def begin(self, stage: str, total: int) -> None:
        """A stage begins, of so many bytes."""

    def advance(self, nbytes: int) -> None:
        """So many bytes of the stage are done."""


class Silent:
    """Progress that nobody sees."""

    def begin(self, stage: str, total: int) -> None:
        """Nothing."""

    def advance(self, nbytes: int) -> None:
        """Nothing."""
