"""Where the bytes of tensors lie in files, with strides of any kind; needs no numpy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Extent", "Lying", "dense_strides"]


def dense_strides(shape: Sequence[int], item_bytes: int) -> tuple[int, ...]:
    """The strides, in bytes, of a C-contiguous array."""
    return tuple(math.prod(shape[dim + 1 :]) * item_bytes for dim in range(len(shape)))


@dataclass(frozen=True, slots=True)
class Lying:
    """How an array lies in one of the files.

    Attributes:
        part: The number of the file.
        start: Offset of the first item there, in bytes.
        shape: Its shape.
        strides: Bytes from an item to the next one along each dimension, none negative.
    """

    part: int
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of the assembled file.

    Attributes:
        start: Offset of the first one.
        nbytes: How many they are.
        item_bytes: Bytes of an item: 1, 2, 4 or 8.
        beside: The arrays that they are taken from, in row-major order: one, or matrices [R, C_i]
            that lie side by side, [R, ΣC_i].
    """

    start: int
    nbytes: int
    item_bytes: int
    beside: tuple[Lying, ...]
