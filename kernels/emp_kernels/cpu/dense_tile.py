"""Multiplies rows that lie in scratch by a few tokens: float32 sums of vectors, added at the end.

Each function is made twice: for float32, and for bfloat16 with AVX-512. Behind each token's
activations are zeros, up to a whole vector.
"""

from typing import Any

import numba
import numpy as np

from emp_kernels.cpu.avx512 import dot_bf16
from emp_kernels.cpu.team import array_at
from emp_kernels.cpu.vectors import F32x16, U16x32, add_lanes, fused, load, splat

__all__ = ["EDGE_BYTES", "VECTOR_BYTES", "multiply_floats", "multiply_words"]

VECTOR_BYTES = 64
"""Activations of a token are padded to a multiple of so many bytes."""

EDGE_BYTES = 2 * VECTOR_BYTES
"""Bytes of scratch for the ends of two rows that fill no vector."""

_njit = numba.njit(nogil=True, cache=True, error_model="numpy")


@_njit
def _dot_floats(sums, row, x):
    return fused(load(F32x16, row), load(F32x16, x), sums)


@_njit
def _dot_words(sums, row, x):
    return dot_bf16(sums, load(U16x32, row), load(U16x32, x))


@_njit
def _copy_end(row, edge, nbytes):
    """Copy the last bytes of a row that fill no vector, and zeros behind them."""
    end = array_at(edge, VECTOR_BYTES, np.uint8)
    end[:nbytes] = array_at(row, nbytes, np.uint8)
    end[nbytes:] = 0


def _products(dot: Any) -> Any:
    """The function that multiplies with such a step."""

    @_njit
    def one_token(row, x, whole, edge, left):
        """The product of a row and a token, in four sums."""
        zeros = splat(F32x16, np.float32(0))
        a, b, c, d = zeros, zeros, zeros, zeros
        fours = whole // (4 * VECTOR_BYTES) * (4 * VECTOR_BYTES)
        for j in range(0, fours, 4 * VECTOR_BYTES):
            a = dot(a, row + j, x + j)
            b = dot(b, row + j + VECTOR_BYTES, x + j + VECTOR_BYTES)
            c = dot(c, row + j + 2 * VECTOR_BYTES, x + j + 2 * VECTOR_BYTES)
            d = dot(d, row + j + 3 * VECTOR_BYTES, x + j + 3 * VECTOR_BYTES)
        for j in range(fours, whole, VECTOR_BYTES):
            a = dot(a, row + j, x + j)
        if left:
            b = dot(b, edge, x + whole)
        return add_lanes((a + b) + (c + d))

    @_njit
    def tile(row, other, x, whole, edge, left):
        """The products of two rows and four tokens."""
        zeros = splat(F32x16, np.float32(0))
        a, b, c, d = zeros, zeros, zeros, zeros
        e, f, g, h = zeros, zeros, zeros, zeros
        for j in range(0, whole + left, VECTOR_BYTES):
            first, second = (row + j, other + j) if j < whole else (edge, edge + VECTOR_BYTES)
            a, b = dot(a, first, x[0] + j), dot(b, first, x[1] + j)
            c, d = dot(c, first, x[2] + j), dot(d, first, x[3] + j)
            e, f = dot(e, second, x[0] + j), dot(f, second, x[1] + j)
            g, h = dot(g, second, x[2] + j), dot(h, second, x[3] + j)
        return (
            (add_lanes(a), add_lanes(b), add_lanes(c), add_lanes(d)),
            (add_lanes(e), add_lanes(f), add_lanes(g), add_lanes(h)),
        )

    @_njit
    def multiply(rows_at, row_bytes, x, x_bytes, edge, sums_TR):
        """Multiply.

        Args:
            rows_at: Address of the rows, one behind the other.
            row_bytes: Bytes of a row.
            x: Address of the tokens' activations.
            x_bytes: Bytes of those of a token, padded.
            edge: Address of scratch, of EDGE_BYTES.
            sums_TR: float32 [tokens, rows], written.
        """
        tokens, rows = sums_TR.shape
        left = row_bytes % VECTOR_BYTES
        whole = row_bytes - left
        for r in range(0, rows, 2):
            second = min(r + 1, rows - 1)
            row, other = rows_at + r * row_bytes, rows_at + second * row_bytes
            if left:
                _copy_end(row + whole, edge, left)
                _copy_end(other + whole, edge + VECTOR_BYTES, left)
            if tokens == 1:
                sums_TR[0, r] = one_token(row, x, whole, edge, left)
                sums_TR[0, second] = one_token(other, x, whole, edge + VECTOR_BYTES, left)
                continue
            for t in range(0, tokens, 4):
                last = tokens - 1
                t1, t2, t3 = min(t + 1, last), min(t + 2, last), min(t + 3, last)
                four = x + t * x_bytes, x + t1 * x_bytes, x + t2 * x_bytes, x + t3 * x_bytes
                sums, others = tile(row, other, four, whole, edge, left)
                sums_TR[t, r], sums_TR[t1, r], sums_TR[t2, r], sums_TR[t3, r] = sums
                sums_TR[t, second], sums_TR[t1, second] = others[0], others[1]
                sums_TR[t2, second], sums_TR[t3, second] = others[2], others[3]

    return multiply


multiply_floats = _products(_dot_floats)
multiply_words = _products(_dot_words)
