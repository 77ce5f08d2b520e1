"""Multiplies rows that lie in scratch by a few tokens: float32 sums of vectors, added at the end.

Four rows are multiplied by four tokens at a time, so that each vector of weights or activations
that is loaded is used four times; and of long rows some columns at a time, so that these weights
stay in the nearest cache for all tokens. The product of a single token is made row by row.

Each function is made twice: for float32, and for bfloat16 with AVX-512. Behind each token's
activations are zeros, up to a whole vector.
"""

from typing import Any

import numba
import numpy as np

from emp_kernels.cpu.avx512 import dot_bf16
from emp_kernels.cpu.team import array_at
from emp_kernels.cpu.vectors import F32x16, U16x32, add_lanes, fused, load, splat, store

__all__ = ["VECTOR_BYTES", "multiply_floats", "multiply_words", "tile_scratch"]

VECTOR_BYTES = 64
"""Activations of a token are padded to a multiple of so many bytes."""

_SIDE = 4
_BLOCK_BYTES = 1024  # of a row: four such rows and 16 such tokens fill less than the nearest cache

_njit = numba.njit(nogil=True, cache=True, error_model="numpy")


@_njit
def tile_scratch(tokens):
    """Bytes of scratch for so many tokens: ends of rows that fill no vector, and sums."""
    return _SIDE * VECTOR_BYTES + (tokens + _SIDE - 1) // _SIDE * _SIDE * _SIDE * VECTOR_BYTES


@_njit
def _load_floats(address):
    return load(F32x16, address)


@_njit
def _add_floats(sums, weights, x):
    return fused(weights, x, sums)


@_njit
def _load_words(address):
    return load(U16x32, address)


@_njit
def _copy_end(row, end, nbytes):
    """Copy the last bytes of a row that fill no vector, and zeros behind them."""
    end_N = array_at(end, VECTOR_BYTES, np.uint8)
    end_N[:nbytes] = array_at(row, nbytes, np.uint8)
    end_N[nbytes:] = 0


@_njit
def _four_sums(address):
    """Four vectors of sums."""
    return (
        load(F32x16, address),
        load(F32x16, address + 64),
        load(F32x16, address + 128),
        load(F32x16, address + 192),
    )


@_njit
def _store_sums(address, sums):
    store(address, sums[0])
    store(address + 64, sums[1])
    store(address + 128, sums[2])
    store(address + 192, sums[3])


@_njit
def _four(address, step, last):
    """The addresses of four items, each `step` behind the one before, none behind `last`."""
    return (
        address,
        min(address + step, last),
        min(address + 2 * step, last),
        min(address + 3 * step, last),
    )


def _products(name: str, load_step: Any, add_step: Any) -> Any:
    """The function that multiplies with such steps, which are told by the name.

    numba names compiled functions by their qualified names, and numbers them anew in each process.
    Without names of their own, code that two processes compiled from two instances of these could
    be linked to each other when a third process loads both.
    """

    def compiled(function: Any) -> Any:
        function.__qualname__ = f"_products.{name}.{function.__name__}"
        return _njit(function)

    @compiled
    def one_token(row, x, whole, left, end):
        """The product of a row and a token, in four sums."""
        zeros = splat(F32x16, np.float32(0))
        a, b, c, d = zeros, zeros, zeros, zeros
        fours = whole // 256 * 256
        for j in range(0, fours, 256):
            a = add_step(a, load_step(row + j), load_step(x + j))
            b = add_step(b, load_step(row + j + 64), load_step(x + j + 64))
            c = add_step(c, load_step(row + j + 128), load_step(x + j + 128))
            d = add_step(d, load_step(row + j + 192), load_step(x + j + 192))
        for j in range(fours, whole, 64):
            a = add_step(a, load_step(row + j), load_step(x + j))
        if left:
            b = add_step(b, load_step(end), load_step(x + whole))
        return add_lanes((a + b) + (c + d))

    @compiled
    def add_four(sums, weights, x):
        """Add the products of a vector of weights with one of each of four tokens."""
        return (
            add_step(sums[0], weights, x[0]),
            add_step(sums[1], weights, x[1]),
            add_step(sums[2], weights, x[2]),
            add_step(sums[3], weights, x[3]),
        )

    @compiled
    def add_tile(rows, x, nbytes, sums):
        """Add products of so many bytes of four rows and of four tokens to sums in memory."""
        a, b = _four_sums(sums), _four_sums(sums + 256)
        c, d = _four_sums(sums + 512), _four_sums(sums + 768)
        for j in range(0, nbytes, VECTOR_BYTES):
            here = (
                load_step(x[0] + j),
                load_step(x[1] + j),
                load_step(x[2] + j),
                load_step(x[3] + j),
            )
            a, b = (
                add_four(a, load_step(rows[0] + j), here),
                add_four(b, load_step(rows[1] + j), here),
            )
            c, d = (
                add_four(c, load_step(rows[2] + j), here),
                add_four(d, load_step(rows[3] + j), here),
            )
        _store_sums(sums, a)
        _store_sums(sums + 256, b)
        _store_sums(sums + 512, c)
        _store_sums(sums + 768, d)

    @compiled
    def four_rows(rows, row_bytes, x, x_bytes, tokens, scratch):
        """Sums of four rows with all tokens, to scratch behind the ends of rows."""
        left = row_bytes % VECTOR_BYTES
        whole = row_bytes - left
        sums, last = scratch + _SIDE * VECTOR_BYTES, x + (tokens - 1) * x_bytes
        tile_bytes = _SIDE * _SIDE * VECTOR_BYTES
        array_at(sums, (tokens + 3) // 4 * tile_bytes, np.uint8)[:] = 0
        for start in range(0, whole, _BLOCK_BYTES):
            nbytes = min(_BLOCK_BYTES, whole - start)
            here = rows[0] + start, rows[1] + start, rows[2] + start, rows[3] + start
            for t in range(0, tokens, _SIDE):
                four = _four(x + t * x_bytes + start, x_bytes, last + start)
                add_tile(here, four, nbytes, sums + t // _SIDE * tile_bytes)
        if left:
            ends = _four(scratch, VECTOR_BYTES, scratch + 3 * VECTOR_BYTES)
            for i in range(_SIDE):
                _copy_end(rows[i] + whole, ends[i], left)
            for t in range(0, tokens, _SIDE):
                four = _four(x + t * x_bytes + whole, x_bytes, last + whole)
                add_tile(ends, four, VECTOR_BYTES, sums + t // _SIDE * tile_bytes)

    @compiled
    def multiply(rows_at, row_bytes, x, x_bytes, scratch, sums_TR):
        """Multiply.

        Args:
            rows_at: Address of the rows, one behind the other.
            row_bytes: Bytes of a row.
            x: Address of the tokens' activations.
            x_bytes: Bytes of those of a token, padded.
            scratch: Address of scratch, of `tile_scratch`.
            sums_TR: float32 [tokens, rows], written.
        """
        tokens, rows = sums_TR.shape
        if tokens == 1:
            left = row_bytes % VECTOR_BYTES
            for r in range(rows):
                row = rows_at + r * row_bytes
                _copy_end(row + row_bytes - left, scratch, left)
                sums_TR[0, r] = one_token(row, x, row_bytes - left, left, scratch)
            return
        for r in range(0, rows, _SIDE):
            last = rows_at + (rows - 1) * row_bytes
            four = _four(rows_at + r * row_bytes, row_bytes, last)
            four_rows(four, row_bytes, x, x_bytes, tokens, scratch)
            for i in range(min(_SIDE, rows - r)):
                for t in range(tokens):
                    place = t // _SIDE * _SIDE * _SIDE + i * _SIDE + t % _SIDE
                    at = scratch + (_SIDE + place) * VECTOR_BYTES
                    sums_TR[t, r + i] = add_lanes(load(F32x16, at))

    return multiply


multiply_floats = _products("floats", _load_floats, _add_floats)
multiply_words = _products("words", _load_words, dot_bf16)
