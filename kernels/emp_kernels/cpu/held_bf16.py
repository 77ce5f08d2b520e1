"""Multiplies and unpacks held rows of bf16 on CPUs with AVX-512 and its instructions for bf16.

One token: as the weights of a row are spread over its columns, they are multiplied and added; they
are never in memory as a row. More tokens: four rows are spread to scratch, and multiplied by four
tokens at a time, so that what is loaded is used four times. The activations are turned like the
weights, see `emp_kernels.cpu.held_planes`.

A sum is made of partial sums in 16 lanes, in which two products are added at a time, and of four
vectors of them for one token. Subnormal numbers count as zero: weights, activations, sums.

The functions whose names begin with ``multiply`` and ``unpack`` are workers, see
`emp_kernels.cpu.team`.
"""

import numba
import numpy as np

from emp_kernels.cpu import held_job as place
from emp_kernels.cpu.avx512 import dot_bf16
from emp_kernels.cpu.floats import pattern_of
from emp_kernels.cpu.held_planes import (
    decode_row,
    plane_bytes,
    planes_scratch,
    spread,
    spread_turned,
)
from emp_kernels.cpu.held_record import ahead_of, mask_word, whole_blocks
from emp_kernels.cpu.held_rows import bias_of, row_number, rows_job
from emp_kernels.cpu.shuffles import rows_high, rows_low
from emp_kernels.cpu.team import array_at, job_at, next_block, own_scratch, run
from emp_kernels.cpu.vectors import (
    M32,
    F32x16,
    U16x32,
    add_lanes,
    count_ones,
    load,
    mask_of,
    prefetch,
    splat,
    store,
    store_some,
)

__all__ = [
    "multiply_bf16_rows",
    "product_room",
    "start_multiply_bf16",
    "start_unpack_bf16",
    "unpack_bf16_rows",
]

_njit = numba.njit(nogil=True, cache=True, error_model="numpy")

_TILE = 4
"""Rows, and tokens, that are multiplied at a time."""


def multiply_bf16_rows(address):
    """The products of rows with tokens; these are turned, at X."""
    job = job_at(address)
    own = own_scratch(job)
    if job[place.TOKENS] == 1:
        _multiply_token(job, own)
    else:
        _multiply_tokens(job, own)


@_njit
def _multiply_token(job, own):
    columns = job[place.COLUMNS]
    high = own + plane_bytes(columns)
    out = array_at(job[place.OUT], job[place.ROWS], np.uint16)
    first, stop = next_block(job)
    while first < stop:
        for r in range(first, stop):
            mask = decode_row(job, r, own)
            total = _dot(mask, columns, own, high, job[place.X], ahead_of(job, r))
            out[r] = pattern_of(np.float32(total + bias_of(job, r)), 16, 7)
        first, stop = next_block(job)


@_njit
def _dot(mask, columns, low, high, x, ahead):
    """The sum of products of the weights in two planes with the activations of their columns."""
    zero = splat(F32x16, np.float32(0))
    a, b, c, d = zero, zero, zero, zero
    start = columns // 128 * 128
    for i in range(0, start, 128):
        prefetch(ahead + i)
        prefetch(ahead + i + 64)
        word = load(np.uint64, mask + (i >> 3))
        left, right = spread(word, low, high)
        a = dot_bf16(a, left, load(U16x32, x + 2 * i))
        b = dot_bf16(b, right, load(U16x32, x + 2 * i + 64))
        low += count_ones(word)
        high += count_ones(word)
        word = load(np.uint64, mask + (i >> 3) + 8)
        left, right = spread(word, low, high)
        c = dot_bf16(c, left, load(U16x32, x + 2 * i + 128))
        d = dot_bf16(d, right, load(U16x32, x + 2 * i + 192))
        low += count_ones(word)
        high += count_ones(word)
    for i in range(start, columns, 64):
        word = mask_word(mask, i, columns)
        left, right = spread(word, low, high)
        a = dot_bf16(a, left, load(U16x32, x + 2 * i))
        b = dot_bf16(b, right, load(U16x32, x + 2 * i + 64))
        low += count_ones(word)
        high += count_ones(word)
    return add_lanes((a + b) + (c + d))


@_njit
def _multiply_tokens(job, own):
    columns, rows, tokens = job[place.COLUMNS], job[place.ROWS], job[place.TOKENS]
    high = own + plane_bytes(columns)
    tile = own + planes_scratch(columns)
    line = 2 * whole_blocks(columns)
    sums = tile + _TILE * line
    first, stop = next_block(job)
    while first < stop:
        for r in range(first, stop, _TILE):
            count = min(_TILE, stop - r)
            for i in range(count):
                mask = decode_row(job, r + i, own)
                spread_turned(mask, columns, own, high, tile + i * line, ahead_of(job, r + i))
            for t in range(0, tokens, _TILE):
                _multiply_tile(tile, job[place.X] + t * line, line, sums)
                _put_tile(job, r, count, t, min(_TILE, tokens - t), rows, sums)
        first, stop = next_block(job)


@_njit
def _multiply_tile(w, x, line, sums):
    """The products of four rows with four tokens, each `line` bytes behind the one before it.

    Args:
        w: Address of the rows, turned.
        x: Address of the activations, turned.
        line: Bytes.
        sums: Address of float32 [4, 4], by row and token, written.
    """
    zero = splat(F32x16, np.float32(0))
    a0, a1, a2, a3 = zero, zero, zero, zero
    b0, b1, b2, b3 = zero, zero, zero, zero
    c0, c1, c2, c3 = zero, zero, zero, zero
    d0, d1, d2, d3 = zero, zero, zero, zero
    for i in range(0, line, 64):
        x0, x1 = load(U16x32, x + i), load(U16x32, x + line + i)
        x2, x3 = load(U16x32, x + 2 * line + i), load(U16x32, x + 3 * line + i)
        row = load(U16x32, w + i)
        a0, a1 = dot_bf16(a0, row, x0), dot_bf16(a1, row, x1)
        a2, a3 = dot_bf16(a2, row, x2), dot_bf16(a3, row, x3)
        row = load(U16x32, w + line + i)
        b0, b1 = dot_bf16(b0, row, x0), dot_bf16(b1, row, x1)
        b2, b3 = dot_bf16(b2, row, x2), dot_bf16(b3, row, x3)
        row = load(U16x32, w + 2 * line + i)
        c0, c1 = dot_bf16(c0, row, x0), dot_bf16(c1, row, x1)
        c2, c3 = dot_bf16(c2, row, x2), dot_bf16(c3, row, x3)
        row = load(U16x32, w + 3 * line + i)
        d0, d1 = dot_bf16(d0, row, x0), dot_bf16(d1, row, x1)
        d2, d3 = dot_bf16(d2, row, x2), dot_bf16(d3, row, x3)
    _put_sums(sums, a0, a1, a2, a3)
    _put_sums(sums + 16, b0, b1, b2, b3)
    _put_sums(sums + 32, c0, c1, c2, c3)
    _put_sums(sums + 48, d0, d1, d2, d3)


@_njit
def _put_sums(sums, a, b, c, d):
    store(sums, add_lanes(a))
    store(sums + 4, add_lanes(b))
    store(sums + 8, add_lanes(c))
    store(sums + 12, add_lanes(d))


@_njit
def _put_tile(job, r, count, t, tokens, rows, sums):
    """Round the sums of so many rows from r on, of so many tokens from t on, to the result."""
    out = array_at(job[place.OUT], job[place.TOKENS] * rows, np.uint16)
    for i in range(count):
        bias = bias_of(job, r + i)
        for j in range(tokens):
            total = load(np.float32, sums + 4 * (_TILE * i + j))
            out[(t + j) * rows + r + i] = pattern_of(np.float32(total + bias), 16, 7)


def unpack_bf16_rows(address):
    """Rows as patterns, one after the other."""
    job = job_at(address)
    own = own_scratch(job)
    columns = job[place.COLUMNS]
    high = own + plane_bytes(columns)
    first, stop = next_block(job)
    while first < stop:
        for i in range(first, stop):
            r = row_number(job, i)
            mask = decode_row(job, r, own)
            target = job[place.OUT] + 2 * i * columns
            _spread_in_order(mask, columns, own, high, target, ahead_of(job, r))
        first, stop = next_block(job)


@_njit
def _spread_in_order(mask, columns, low, high, target, ahead):
    """Write a row to an address, and nothing past its last column."""
    for c in range(0, columns, 64):
        prefetch(ahead + c)
        word = mask_word(mask, c, columns)
        left, right = spread(word, low, high)
        halves = rows_low(left, right), rows_high(left, right)
        if columns - c >= 64:
            store(target + 2 * c, halves[0])
            store(target + 2 * c + 64, halves[1])
        else:
            inside = (np.uint64(1) << np.uint64(columns - c)) - np.uint64(1)
            low_half, high_half = np.uint32(inside), np.uint32(inside >> np.uint64(32))
            store_some(target + 2 * c, halves[0], mask_of(M32, low_half))
            store_some(target + 2 * c + 64, halves[1], mask_of(M32, high_half))
        low += count_ones(word)
        high += count_ones(word)


@_njit
def _turn_token(x_C, columns, address):
    """Write a token's activations, turned, to an address, and zeros past the last one."""
    turned = array_at(address, whole_blocks(columns), np.uint16)
    for c in range(whole_blocks(columns)):
        # 8s and 16s and 32s of the column's number change places
        turned[(c & ~56) | (c & 8) << 2 | (c & 48) >> 1] = x_C[c] if c < columns else 0


@_njit
def start_multiply_bf16(arguments, x_TC, out_TR, bias_R, tables, worker, room, team):
    """Multiply tokens by held rows of bf16.

    Arguments are those of `emp_kernels.cpu.held_rows.start_multiply`, but for:
        worker: The address of `multiply_bf16_rows`.
        room: uint8, scratch: `product_room` for T, C and the team's threads.
    """
    tokens, columns = x_TC.shape
    start = (room.ctypes.data + 63) // 64 * 64
    job = rows_job(arguments, tables, out_TR.ctypes.data)
    job[place.TOKENS], job[place.X] = tokens, start
    job[place.BIAS] = bias_R.ctypes.data if bias_R.size else 0
    for t in range(tokens):
        _turn_token(x_TC[t], columns, start + 2 * t * whole_blocks(columns))
    own = start + _tokens_bytes(tokens, columns)
    run(job, worker, out_TR.shape[1], out_TR.size * columns, own, _scratch_bytes(columns), team)


@_njit
def start_unpack_bf16(arguments, first, row_N, out_NC, tables, worker, room, team):
    """Decode held rows of bf16.

    Arguments are those of `emp_kernels.cpu.held_rows.start_unpack`, but for:
        worker: The address of `unpack_bf16_rows`.
        room: uint8, scratch: `product_room` for no tokens.
    """
    rows, columns = out_NC.shape
    start = (room.ctypes.data + 63) // 64 * 64
    job = rows_job(arguments, tables, out_NC.ctypes.data)
    job[place.FIRST_ROW] = first
    job[place.ROW_LIST] = row_N.ctypes.data if row_N.size else 0
    run(job, worker, rows, out_NC.size, start, _scratch_bytes(columns), team)


@_njit
def product_room(tokens, columns, threads):
    """Bytes of scratch for one product."""
    return _tokens_bytes(tokens, columns) + threads * _scratch_bytes(columns) + 64


@_njit
def _tokens_bytes(tokens, columns):
    """Bytes of the activations of whole tiles of tokens."""
    return (tokens + _TILE - 1) // _TILE * _TILE * 2 * whole_blocks(columns)


@_njit
def _scratch_bytes(columns):
    """Bytes of scratch of a worker: planes, a tile of rows, and of sums."""
    return planes_scratch(columns) + _TILE * 2 * whole_blocks(columns) + 4 * _TILE * _TILE
