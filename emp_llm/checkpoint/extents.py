"""Where the bytes of a tensor lie in files, with any strides. Needs no numpy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Extent", "StridedArray", "dense_strides"]


def dense_strides(shape: Sequence[int], item_bytes: int) -> tuple[int, ...]:
    """The strides, in bytes, of a C-contiguous array."""
    return tuple(math.prod(shape[dim + 1 :]) * item_bytes for dim in range(len(shape)))


@dataclass(frozen=True, slots=True)
class StridedArray:
    """An array of items in one of several files.

    Attributes:
        part: The number of the file.
        start: Offset of the first item in that file, in bytes.
        shape: Sizes, outermost first.
        strides: Bytes from an item to the next one along each dimension, none negative.
    """

    part: int
    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of an assembled file, and where its bytes are taken from.

    Attributes:
        start: Offset of its first byte in the assembled file.
        nbytes: Its length in bytes.
        item_bytes: Bytes of an item: 1, 2, 4 or 8.
        arrays: What it holds, in row-major order: one array, or several matrices [R, C_i] side by
            side, which make one matrix [R, ΣC_i].
    """

    start: int
    nbytes: int
    item_bytes: int
    arrays: tuple[StridedArray, ...]
