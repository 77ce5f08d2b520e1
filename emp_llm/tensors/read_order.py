"""The byte ranges in which the rows of a tensor are read, in order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.shard import Shard
from emp_llm.tensors.code_choice import sample_places
from emp_llm.tensors.geometry import Geometry, RowBlock, WholeGeometry
from emp_llm.tensors.layout_choice import sample_blocks
from emp_llm.tensors.target import Target

__all__ = ["Span", "has_ranges", "rest_spans", "target_spans"]


_SMALL_TENSOR = 16 << 20
"""Tensors of up to so many bytes are downloaded in one piece."""


@dataclass(eq=False)
class Span:
    """A range of a shard that will be read, once or in parts.

    Attributes:
        shard: The shard.
        start: Offset of its first byte.
        stop: Offset behind its last byte.
        left: Bytes of it that are still to be read, those read twice counted twice; at 0 its data
            is freed.
        data: What has arrived, or is arriving.
        arrived: Whether all of it has arrived.
    """

    shard: Shard
    start: int
    stop: int
    left: int
    data: bytearray | None = field(default=None, repr=False)
    arrived: bool = False

    @property
    def nbytes(self) -> int:
        """Its length in bytes."""
        return self.stop - self.start


def has_ranges(shard: Shard) -> bool:
    """Whether the tensors of a shard lie in one file, at the offsets in its header.

    Those of ``torch.save`` and of Meta's format do not: their bytes are assembled.
    """
    return len(shard.parts) == 1 and type(shard) is type(shard.parts[0]) is Shard


def target_spans(target: Target) -> Iterator[Span]:
    """The spans that are read of a target, in order: a sample of rows, then all row blocks."""
    return _spans(target.shard, target.entry, target.geometry, sample_blocks(target.geometry))


def rest_spans(shard: Shard, entry: TensorEntry, geometry: WholeGeometry) -> Iterator[Span]:
    """The spans that are read of a tensor to pack it without pruning it, likewise."""
    return _spans(shard, entry, geometry, sample_places(geometry))


def _spans(
    shard: Shard, entry: TensorEntry, geometry: Geometry, sampled: Sequence[RowBlock]
) -> Iterator[Span]:
    """The layout is chosen by the sample, so its rows are read twice."""
    at = entry.start
    sample_bytes = sum(geometry.block_bytes(block) for block in sampled)
    if geometry.nbytes <= _SMALL_TENSOR:
        yield Span(shard, at, at + geometry.nbytes, geometry.nbytes + sample_bytes)
        return
    if geometry.transposed:  # a row block takes bytes from all over its matrix
        size = geometry.nbytes // geometry.matrices
        for matrix in range(geometry.matrices):
            start = at + matrix * size
            yield Span(shard, start, start + size, size + (0 if matrix else sample_bytes))
        return
    for block in (*sampled, *geometry.row_blocks()):
        start = at + geometry.first_row(block) * geometry.row_bytes
        yield Span(shard, start, start + geometry.block_bytes(block), geometry.block_bytes(block))
