"""Matrices turned, so that columns become rows.

Tile by tile, by way of a buffer: where lines lie a power of two apart they share a few sets of the
cache, and so each is read and written in long pieces, and only once.
"""

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

__all__ = ["turn_lines"]

_njit = numba.njit(nogil=True, cache=True)

_TILE_BYTES = 256
"""Of a line of a tile: a buffer of 32 kB for 16-bit items, and no more pages than a TLB holds."""

_VECTOR_BYTES = 16
"""Any CPU interleaves two such vectors in two instructions."""


@_njit
def turn_lines(source, source_line, target, target_line, lines, width):
    """target[j · target_line + i] = source[i · source_line + j] for all i < lines and j < width."""
    edge = _TILE_BYTES // source.itemsize
    tile = np.empty(edge * edge, source.dtype)
    for i in range(0, lines, edge):
        height = min(edge, lines - i)
        for j in range(0, width, edge):
            across = min(edge, width - j)
            _turn_tile(source, i * source_line + j, source_line, height, across, tile, edge)
            for c in range(across):
                at = (j + c) * target_line + i
                _copy(tile[c * edge : c * edge + height], target[at : at + height])


@_njit
def _copy(source, target):
    for i in range(source.size):
        target[i] = source[i]


@_njit
def _turn_tile(source, start, line, height, across, tile, edge):
    lanes = _VECTOR_BYTES // source.itemsize
    whole_height, whole_across = height - height % lanes, across - across % lanes
    for r in range(0, whole_height, lanes):
        for c in range(0, whole_across, lanes):
            _turn_square(source, start + r * line + c, line, tile, c * edge + r, edge)
    for r in range(height):
        for c in range(whole_across if r < whole_height else 0, across):
            tile[c * edge + r] = source[start + r * line + c]


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
        # each line interleaved with the one half of them further on: as often as makes all n of
        # them meet, that turns the square
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
