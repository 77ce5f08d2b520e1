"""Transposes matrices of bit patterns, so that columns become rows.

Square patches of _PATCH_BYTES a side go through a buffer. Where a matrix's lines lie a power of two
of bytes apart, the items of a column fall into a few sets of the cache, which cannot hold a patch.
The buffer's lines lie close together, so each piece of a line of the matrices is read once and
written once, _PATCH_BYTES at a time.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

__all__ = ["turn_lines"]

_njit = numba.njit(nogil=True, cache=True)

_PATCH_BYTES = 256
"""Bytes in a line of a patch: the buffer has 32 KiB for 16-bit items, and the patch lies on no more
pages than a TLB holds."""

_VECTOR_BYTES = 16
"""SSE2 and NEON interleave two vectors of this size in two instructions, so any CPU does."""


@_njit
def turn_lines(source, source_line, target, target_line, lines, width):
    """target[j · target_line + i] = source[i · source_line + j] for all i < lines and j < width."""
    edge = _PATCH_BYTES // source.itemsize
    patch = np.empty(edge * edge, source.dtype)
    for i in range(0, lines, edge):
        height = min(edge, lines - i)
        for j in range(0, width, edge):
            across = min(edge, width - j)
            _turn_patch(source, i * source_line + j, source_line, height, across, patch, edge)
            for c in range(across):
                at = (j + c) * target_line + i
                _copy(patch[c * edge : c * edge + height], target[at : at + height])


@_njit
def _copy(source, target):
    for i in range(source.size):
        target[i] = source[i]


@_njit
def _turn_patch(source, start, line, height, across, patch, edge):
    lanes = _VECTOR_BYTES // source.itemsize
    whole_height, whole_across = height - height % lanes, across - across % lanes
    for r in range(0, whole_height, lanes):
        for c in range(0, whole_across, lanes):
            _turn_square(source, start + r * line + c, line, patch, c * edge + r, edge)
    for r in range(height):
        for c in range(whole_across if r < whole_height else 0, across):
            patch[c * edge + r] = source[start + r * line + c]


@intrinsic
def _turn_square(
    _context: Any, source: Any, at: Any, line: Any, target: Any, to: Any, target_line: Any
) -> Any:
    """Turn a square of as many lines as a vector has lanes.

    ``_turn_square(source, at, line, target, to, target_line)`` reads the vectors at source[at:],
    source[at + line:] and so on, and writes those at target[to:], target[to + target_line:] ...
    """
    lanes = _VECTOR_BYTES * 8 // source.dtype.bitwidth
    item_bytes = source.dtype.bitwidth // 8
    vector = ir.VectorType(ir.IntType(source.dtype.bitwidth), lanes)
    signature = types.void(source, types.int64, types.int64, target, types.int64, types.int64)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, at, line, target, to, target_line = arguments

        def pointers(kind: Any, array: Any, index: Any, step: Any) -> list[Any]:
            data = cgutils.create_struct_proxy(kind)(context, builder, array).data
            found = []
            for _ in range(lanes):
                found.append(builder.bitcast(builder.gep(data, [index]), vector.as_pointer()))
                index = builder.add(index, step)
            return found

        kinds = signature.args
        rows = [builder.load(p, align=item_bytes) for p in pointers(kinds[0], source, at, line)]
        half = lanes // 2
        halves = [
            ir.Constant(
                ir.VectorType(ir.IntType(32), lanes),
                [lane for i in range(first, first + half) for lane in (i, lanes + i)],
            )
            for first in (0, half)
        ]
        # Interleaving line i with line i + n/2 of n moves the topmost bit of an item's line number
        # to the lowest of its column number, and so on round. log2(n) times, all bits of the two
        # have changed places: the square is turned.
        for _ in range(half.bit_length()):
            rows = [
                builder.shuffle_vector(rows[i], rows[half + i], interleaved)
                for i in range(half)
                for interleaved in halves
            ]
        for row, pointer in zip(rows, pointers(kinds[3], target, to, target_line), strict=True):
            builder.store(row, pointer, align=item_bytes)
        return context.get_dummy_value()

    return signature, codegen
