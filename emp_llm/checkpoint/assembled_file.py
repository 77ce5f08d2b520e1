"""A file of weights that is nowhere as such, put together as it is read from where its bytes lie.

Its tensors may lie with strides (a transposed view, heads in another order) and in several parts,
one below or beside the other. What is asked for is read, a few megabytes around it at most.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from emp_llm.checkpoint.extents import Extent, Lying, dense_strides
from emp_llm.checkpoint.source_file import SourceFile

__all__ = ["AssembledFile"]


_HULL = 2  # what is read at once may be so many times what is wanted of it
_CHUNK = 1 << 20

Items = npt.NDArray[Any]


class AssembledFile(SourceFile):
    """A file that is assembled from others.

    Args:
        name: What to call it in errors.
        parts: The files, which it closes with itself.
        extents: What it is made of: from its beginning to its end, without holes.
    """

    def __init__(self, name: str, parts: Sequence[SourceFile], extents: Sequence[Extent]) -> None:
        self.name = name
        self._parts = parts
        self._extents = [extent for extent in extents if extent.nbytes]
        self._starts = [extent.start for extent in self._extents]

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes from an offset on.

        Raises:
            CheckpointError: If a part cannot be read or ends early.
        """
        out = np.frombuffer(buffer, np.uint8)
        number = bisect_right(self._starts, offset) - 1
        while out.size:
            extent = self._extents[number]
            first = offset - extent.start
            count = min(out.size, extent.nbytes - first)
            self._read(extent, first, out[:count])
            out, offset, number = out[count:], offset + count, number + 1

    def close(self) -> None:
        """Nothing more is to be read."""
        for part in self._parts:
            part.close()

    def _read(self, extent: Extent, first: int, out: Items) -> None:
        """Fill out, uint8, with the bytes of an extent from the first one on."""
        item = extent.item_bytes
        last = first + out.size
        if first % item or last % item:  # nobody reads part of an item, but it would be right
            begin, end = first // item * item, -(-last // item) * item
            whole = np.empty(end - begin, np.uint8)
            self._read(extent, begin, whole)
            out[:] = whole[first - begin : last - begin]
        elif len(extent.beside) == 1:
            self._take(extent.beside[0], first // item, out.view(f"u{item}"))
        else:
            self._read_beside(extent, first, out)

    def _read_beside(self, extent: Extent, first: int, out: Items) -> None:
        item = extent.item_bytes
        widths = [lying.shape[1] for lying in extent.beside]
        line = sum(widths) * item
        begin, end = first // line, -(-(first + out.size) // line)
        aligned = out.size == (end - begin) * line
        lines = out if aligned else np.empty((end - begin) * line, np.uint8)
        matrix = lines.view(f"u{item}").reshape(end - begin, -1)
        at = 0
        for lying, width in zip(extent.beside, widths, strict=True):
            start = lying.start + begin * lying.strides[0]
            strip = matrix[:, at : at + width]
            self._gather(lying.part, start, lying.strides, strip)
            at += width
        if not aligned:
            skipped = first - begin * line
            out[:] = lines[skipped : skipped + out.size]

    def _take(self, lying: Lying, first: int, out: Items) -> None:
        """Fill out with an array's items from the first one on, in row-major order."""
        if len(lying.shape) < 2:
            stride = lying.strides[0] if lying.strides else 0
            self._gather(lying.part, lying.start + first * stride, (stride,), out)
            return
        inner = math.prod(lying.shape[1:])
        while out.size:
            index, skipped = divmod(first, inner)
            start = lying.start + index * lying.strides[0]
            if skipped or out.size < inner:
                count = min(inner - skipped, out.size)
                row = Lying(lying.part, start, lying.shape[1:], lying.strides[1:])
                self._take(row, skipped, out[:count])
            else:
                rows = out.size // inner
                count = rows * inner
                box = out[:count].reshape(rows, *lying.shape[1:])
                self._gather(lying.part, start, lying.strides, box)
            first, out = first + count, out[count:]

    def _gather(self, part: int, start: int, strides: Sequence[int], out: Items) -> None:
        """Fill out, of any dimensions and strides of its own, with items that lie with strides."""
        file = self._parts[part]
        reach = sum((size - 1) * stride for size, stride in zip(out.shape, strides, strict=True))
        hull = reach + out.itemsize
        if out.flags.c_contiguous and _is_dense(out.shape, strides, out.itemsize):
            file.read_into(start, out.reshape(-1).view(np.uint8).data)
        elif hull <= max(_HULL * out.nbytes, out.itemsize):
            data = np.empty(hull, np.uint8)
            file.read_into(start, data.data)
            out[...] = np.ndarray(out.shape, out.dtype, data.data, strides=tuple(strides))
        else:
            self._gather_by_parts(part, start, strides, out)

    def _gather_by_parts(self, part: int, start: int, strides: Sequence[int], out: Items) -> None:
        widest = max(range(out.ndim), key=lambda dim: strides[dim])
        if out.ndim > 1:
            others = [*strides[:widest], *strides[widest + 1 :]]
            for index in range(out.shape[widest]):
                slice_ = out[(slice(None),) * widest + (index,)]
                self._gather(part, start + index * strides[widest], others, slice_)
            return
        stride = strides[0]
        step = max(1, _CHUNK // stride)
        for index in range(0, len(out), step):
            wanted = out[index : index + step]
            data = np.empty((len(wanted) - 1) * stride + out.itemsize, np.uint8)
            self._parts[part].read_into(start + index * stride, data.data)
            wanted[...] = np.ndarray(wanted.shape, out.dtype, data.data, strides=(stride,))


def _is_dense(shape: Sequence[int], strides: Sequence[int], item_bytes: int) -> bool:
    dense = dense_strides(shape, item_bytes)
    return all(
        size < 2 or stride == expected
        for size, stride, expected in zip(shape, strides, dense, strict=True)
    )
