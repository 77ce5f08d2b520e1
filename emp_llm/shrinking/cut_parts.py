"""Reads what is kept of a tensor, a few megabytes at a time, in the order of the result.

Where what is kept lies in long stretches, only these are read; where it is scattered, all is read
and the rest dropped.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from emp_kernels.rows import Bytes, Workspace

from emp_llm.checkpoint.dtypes import item_bytes
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.files.checksum import COPY_BYTES
from emp_llm.shrinking.cuts import Cut, Indices

__all__ = ["CutPart", "cut_parts"]

_LONG = 4096
"""Bytes of a stretch that is worth a read of its own."""

Stretch = tuple[int, int]
"""Where some bytes begin in the source's file, and how many they are."""


@dataclass(frozen=True, kw_only=True)
class CutPart:
    """Some bytes of a cut tensor, next to each other in the result.

    Attributes:
        stretches: Where they are in the source.
        shape: If some of what is read there is dropped, its shape.
        kept: What is kept of that, by dimension.
        item: Bytes of an item.
    """

    stretches: tuple[Stretch, ...]
    shape: tuple[int, ...] = ()
    kept: Mapping[int, Indices] = field(default_factory=dict)
    item: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return sum(nbytes for _, nbytes in self.stretches)

    @property
    def kept_bytes(self) -> int:
        """Bytes that are left of these."""
        if not self.kept:
            return self.nbytes
        sizes = (len(self.kept.get(d, range(size))) for d, size in enumerate(self.shape))
        return math.prod(sizes) * self.item

    def read(self, file: SourceFile, workspace: Workspace, name: str = "weights") -> Bytes:
        """The bytes that are kept, uint8; they may lie in the workspace.

        Args:
            file: The source's file.
            workspace: Buffers to use again.
            name: The buffer's name there.

        Raises:
            CheckpointError: If they cannot be read.
        """
        data = workspace.take(name, self.nbytes)[: self.nbytes]
        at = 0
        for offset, nbytes in self.stretches:
            file.read_into(offset, data[at : at + nbytes].data)
            at += nbytes
        if not self.kept:
            return data
        items = data.view(f"u{self.item}").reshape(self.shape)
        for dimension, indices in self.kept.items():
            items = np.take(items, indices, axis=dimension)
        return items.reshape(-1).view(np.uint8)


def cut_parts(cut: Cut) -> Iterator[CutPart]:
    """The parts of a cut tensor, in order.

    Args:
        cut: The tensor; its items are whole bytes.
    """
    return _parts(cut.entry.start, cut.entry.shape, cut.kept, item_bytes(cut.entry.dtype))


def _parts(
    offset: int, shape: tuple[int, ...], kept: Mapping[int, Indices], item: int
) -> Iterator[CutPart]:
    """The parts of a tensor, or of one slice of it."""
    if not kept:
        yield from _gathered([(offset, math.prod(shape) * item)])
        return
    first = min(kept)
    slice_bytes = math.prod(shape[first + 1 :]) * item
    row_bytes = shape[first] * slice_bytes
    inner = {dimension - first - 1: kept[dimension] for dimension in kept if dimension > first}
    rows = range(math.prod(shape[:first]))
    runs = [(run[0], len(run)) for run in _runs(kept[first])]
    if not inner and (row_bytes > COPY_BYTES or len(kept[first]) * slice_bytes > _LONG * len(runs)):
        yield from _gathered(
            (offset + row * row_bytes + start * slice_bytes, length * slice_bytes)
            for row in rows
            for start, length in runs
        )
    elif row_bytes <= COPY_BYTES:
        some = max(1, COPY_BYTES // max(1, row_bytes))
        for row in rows[::some]:
            count = min(some, len(rows) - row)
            yield CutPart(
                stretches=((offset + row * row_bytes, count * row_bytes),),
                shape=(count, *shape[first:]),
                kept={dimension - first + 1: indices for dimension, indices in kept.items()},
                item=item,
            )
    else:
        for row in rows:
            for index in kept[first].tolist():
                at = offset + row * row_bytes + index * slice_bytes
                yield from _parts(at, shape[first + 1 :], inner, item)


def _runs(indices: Indices) -> list[Indices]:
    """Ascending indices, parted where one is left out; none of nothing."""
    parts = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
    return [part for part in parts if part.size]


def _gathered(stretches: Iterable[Stretch]) -> Iterator[CutPart]:
    """Parts of whole stretches; long ones are divided, short ones are read together."""
    some: list[Stretch] = []
    room = COPY_BYTES
    for offset, nbytes in stretches:
        start = 0
        while start < nbytes:
            length = min(room, nbytes - start)
            some.append((offset + start, length))
            start, room = start + length, room - length
            if not room:
                yield CutPart(stretches=tuple(some))
                some, room = [], COPY_BYTES
    if some:
        yield CutPart(stretches=tuple(some))
