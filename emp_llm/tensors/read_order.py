"""In which spans the rows of a target are read."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from emp_llm.checkpoint.shard import Shard
from emp_llm.tensors.layout_choice import sample_blocks
from emp_llm.tensors.target import Target

__all__ = ["Span", "has_ranges", "spans"]


_SMALL_TENSOR = 16 << 20
"""Tensors up to this size are fetched in one piece."""


@dataclass(eq=False)
class Span:
    """A range of a shard that will be read, once or in parts.

    Attributes:
        shard: The shard.
        start: Its first byte.
        stop: The one behind its last.
        left: Bytes that are still to be read of it, those read twice counted twice; it is let go
            of then.
        data: What has arrived, or is arriving.
        arrived: Whether all of it has.
    """

    shard: Shard
    start: int
    stop: int
    left: int
    data: bytearray | None = field(default=None, repr=False)
    arrived: bool = False

    @property
    def nbytes(self) -> int:
        """Its length."""
        return self.stop - self.start


def has_ranges(shard: Shard) -> bool:
    """Whether a shard's tensors lie in one file as its header tells: not so in those of torch."""
    return len(shard.parts) == 1 and type(shard) is type(shard.parts[0]) is Shard


def spans(target: Target) -> Iterator[Span]:
    """What is read of a target, in order: rows to choose a layout by, then all blocks."""
    geometry, shard, at = target.geometry, target.shard, target.entry.start
    sampled = sample_blocks(geometry)
    sample_bytes = sum(geometry.block_bytes(block) for block in sampled)
    if geometry.nbytes <= _SMALL_TENSOR:
        yield Span(shard, at, at + geometry.nbytes, geometry.nbytes + sample_bytes)
        return
    if geometry.transposed:  # rows run across a matrix, so that each block takes from all of it
        size = geometry.nbytes // geometry.matrices
        for matrix in range(geometry.matrices):
            start = at + matrix * size
            yield Span(shard, start, start + size, size + (0 if matrix else sample_bytes))
        return
    for block in (*sampled, *geometry.row_blocks()):
        start = at + geometry.first_row(block) * geometry.row_bytes
        yield Span(shard, start, start + geometry.block_bytes(block), geometry.block_bytes(block))
