"""A file of weights that does not exist on disk: its bytes are assembled as they are read.

They come from other files, the parts. A tensor may lie there with strides (as a transposed view, or
with its heads in another order), and in several parts, whose matrices are put one below the other
or side by side. Only what is asked for is read, and a few megabytes around it at most.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from emp_llm.checkpoint.extents import Extent, StridedArray, dense_strides
from emp_llm.checkpoint.source_file import SourceFile

__all__ = ["AssembledFile"]


_HULL = 2  # items with gaps are read in one go if that is at most so many times their bytes
_CHUNK = 1 << 20  # bytes read at a time where it is more

Items = npt.NDArray[Any]


class AssembledFile(SourceFile):
    """A file that is assembled from others.

    Args:
        name: What to call it in errors.
        parts: The files, which it closes with itself.
        extents: Its ranges, from its beginning to its end, without holes.
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
        """Close the parts."""
        for part in self._parts:
            part.close()

    def _read(self, extent: Extent, first: int, out: Items) -> None:
        """Fill `out`, uint8 [n], with n bytes of an extent, from its byte `first` on."""
        item = extent.item_bytes
        last = first + out.size
        if first % item or last % item:  # no caller reads part of an item today; it works too
            begin, end = first // item * item, -(-last // item) * item
            whole = np.empty(end - begin, np.uint8)
            self._read(extent, begin, whole)
            out[:] = whole[first - begin : last - begin]
        elif len(extent.arrays) == 1:
            self._take(extent.arrays[0], first // item, out.view(f"u{item}"))
        else:
            self._read_side_by_side(extent, first, out)

    def _read_side_by_side(self, extent: Extent, first: int, out: Items) -> None:
        item = extent.item_bytes
        widths = [array.shape[1] for array in extent.arrays]
        line = sum(widths) * item
        begin, end = first // line, -(-(first + out.size) // line)
        aligned = out.size == (end - begin) * line
        lines = out if aligned else np.empty((end - begin) * line, np.uint8)
        matrix = lines.view(f"u{item}").reshape(end - begin, -1)
        at = 0
        for array, width in zip(extent.arrays, widths, strict=True):
            start = array.start + begin * array.strides[0]
            strip = matrix[:, at : at + width]
            self._gather(array.part, start, array.strides, strip)
            at += width
        if not aligned:
            skipped = first - begin * line
            out[:] = lines[skipped : skipped + out.size]

    def _take(self, array: StridedArray, first: int, out: Items) -> None:
        """Fill `out`, [n], with n items of an array in row-major order, from item `first` on.

        The largest boxes that are whole are gathered at once: rows of a matrix, matrices of a
        stack. What is left at the two ends is taken from inside one of them.
        """
        if len(array.shape) < 2:
            stride = array.strides[0] if array.strides else 0
            self._gather(array.part, array.start + first * stride, (stride,), out)
            return
        inner = math.prod(array.shape[1:])
        while out.size:
            index, skipped = divmod(first, inner)
            start = array.start + index * array.strides[0]
            if skipped or out.size < inner:
                count = min(inner - skipped, out.size)
                row = StridedArray(array.part, start, array.shape[1:], array.strides[1:])
                self._take(row, skipped, out[:count])
            else:
                rows = out.size // inner
                count = rows * inner
                box = out[:count].reshape(rows, *array.shape[1:])
                self._gather(array.part, start, array.strides, box)
            first, out = first + count, out[count:]

    def _gather(self, part: int, start: int, strides: Sequence[int], out: Items) -> None:
        """Fill `out` with the items that lie in a part from a byte on, with strides.

        Args:
            part: The number of the file.
            start: Offset of the first item, in bytes.
            strides: In bytes, one for each dimension of `out`.
            out: Of any shape; it may itself be a strip of a wider matrix.
        """
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
        # Loop over the dimension whose items lie farthest apart; each of its slices is gathered
        # by itself, and is dense, or has gaps small enough to be read over, sooner or later.
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
