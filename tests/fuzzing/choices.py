"""Where the inputs of the fuzzer come from: numbers drawn one after the other."""

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")

EDGES = [
    *(0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 63, 64, 65, 127, 128, 255, 256, 65535, 65536),
    *(1 << 22, (1 << 22) + 1, 1 << 24, 1 << 31, 1 << 32, 1 << 40, 1 << 61),
    *((1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 10**30, -1, -2, -(1 << 31), -(1 << 63)),
]
"""Numbers at which arithmetic goes wrong."""


class Choices:
    """Draws that one seed decides.

    Args:
        seed: The same one gives the same draws.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311 (nothing is secret)

    def number(self, low: int, high: int) -> int:
        """A whole number from low to high."""
        return self._random.randint(low, high)

    def data(self, size: int) -> bytes:
        """So many bytes."""
        return self._random.randbytes(size)

    def once_in(self, times: int) -> bool:
        """True once in so many times."""
        return self.number(1, times) == 1

    def pick(self, things: Sequence[T]) -> T:
        """One of some things."""
        return things[self.number(0, len(things) - 1)]

    def place(self, size: int) -> int:
        """An index into so many things, which are one at least."""
        return self.number(0, size - 1)

    def edge(self) -> int:
        """A number at which arithmetic goes wrong, or one beside it."""
        return self.pick(EDGES) + (self.number(-1, 1) if self.once_in(4) else 0)

    def some(self, least: int, most: int, make: Callable[[], T]) -> list[T]:
        """A list of so many things."""
        return [make() for _ in range(self.number(least, most))]


def damaged(choices: Choices, data: bytes, tokens: Sequence[bytes]) -> bytes:
    """Bytes with a few changes: bits, cuts, repeats, and tokens that mean something there."""
    changed = bytearray(data)
    for _ in range(choices.number(1, 3)):
        at = choices.place(len(changed) + 1)
        stop = min(len(changed), at + choices.pick([1, 1, 2, 4, 8, 16, 64]))
        how = choices.number(0, 5)
        if how == 0 and at < len(changed):
            changed[at] ^= 1 << choices.number(0, 7)
        elif how == 1 and at < len(changed):
            changed[at] = choices.pick([0, 1, 0x7F, 0x80, 0xFF, choices.number(0, 255)])
        elif how == 2:
            changed[at:at] = choices.pick(tokens)
        elif how == 3:
            changed[at:stop] = b""
        elif how == 4:
            changed[at:at] = changed[at:stop]
        else:
            changed[at:stop] = choices.pick(tokens)
    return bytes(changed)
