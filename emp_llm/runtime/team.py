"""The processes that prune one checkpoint together; here, of a run with one process.

`emp_llm.runtime.ranks` has those of a run with several.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["Team"]

T = TypeVar("T")


class Team:
    """All processes of a run; this class is the one process that works alone.

    All ranks make the same calls of `share` and `gather`, in the same order.

    Attributes:
        rank: This process's number, from 0.
        size: How many there are.
        local_size: How many of them are on this machine.
    """

    rank = 0
    size = 1
    local_size = 1

    @property
    def leads(self) -> bool:
        """Whether this process does what is done once for all."""
        return self.rank == 0

    def share(self, make: Callable[[], T]) -> T:
        """Have the first rank make a value, and give it to all.

        Args:
            make: Makes the value, which JSON can hold; called on the first rank only.

        Raises:
            RankError: If another rank failed.
        """
        return make()

    def gather(self, value: T) -> list[T]:
        """Give the value of each rank, which JSON can hold, to all ranks, in their order.

        Raises:
            RankError: If another rank failed.
        """
        return [value]

    def check(self, nbytes: int = 0) -> None:
        """Count bytes that are done here, for the first rank's progress.

        Raises:
            RankError: If another rank failed.
        """

    def forward_progress(self, advance: Callable[[int], None]) -> None:
        """From now on, the first rank calls `advance` with the bytes that other ranks have done."""

    @contextmanager
    def stopping(self, _stop: Callable[[], None]) -> Iterator[None]:
        """Within this block, a failure of another rank calls `_stop`, from another thread."""
        yield

    @contextmanager
    def working(self) -> Iterator[None]:
        """Announce an error that leaves this block to the other ranks, or raise theirs instead."""
        yield
