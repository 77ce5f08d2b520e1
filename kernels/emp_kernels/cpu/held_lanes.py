"""Multiplies and unpacks held rows of any format and layout on CPUs with AVX-512.

Products are those of float32. One token: the weights of a row are multiplied as they are spread
over its columns. More tokens: rows are spread to scratch, and `emp_kernels.cpu.dense_tile`
multiplies.

The functions whose names begin with ``multiply`` and ``unpack`` are workers, see
`emp_kernels.cpu.team`; there is one for each format.
"""

import numba
import numpy as np

from emp_kernels.cpu import held_job as place
from emp_kernels.cpu.avx512 import expand, floats_of_patterns
from emp_kernels.cpu.byte_planes import look_up_codes
from emp_kernels.cpu.dense_tile import multiply_floats, tile_scratch
from emp_kernels.cpu.floats import pattern_of
from emp_kernels.cpu.held_record import ahead_of, escape_place, find_parts, mask_word, whole_blocks
from emp_kernels.cpu.held_rows import bias_of, padded, row_number, rows_job, write_floats
from emp_kernels.cpu.lanes import LANE_SLACK, decode_lanes
from emp_kernels.cpu.team import array_at, job_at, next_block, own_scratch, run
from emp_kernels.cpu.vectors import (
    M16,
    BF16x16,
    F16x16,
    F32x16,
    U16x32,
    U32x16,
    add_lanes,
    count_ones,
    fused,
    load,
    mask_of,
    prefetch,
    splat,
    store,
    store_some,
)

__all__ = [
    "lanes_room",
    "multiply_bf16_lanes",
    "multiply_f16_lanes",
    "multiply_f32_lanes",
    "start_multiply_lanes",
    "start_unpack_lanes",
    "unpack_bf16_lanes",
    "unpack_f16_lanes",
    "unpack_f32_lanes",
]

_njit = numba.njit(nogil=True, cache=True, error_model="numpy")

_TILE = 4
"""Rows that are spread to scratch at a time."""


def multiply_bf16_lanes(address):
    """The products of rows of bf16 with tokens, whose float32 are at X."""
    _multiply(job_at(address), BF16x16, U16x32)


def multiply_f16_lanes(address):
    """The same for fp16."""
    _multiply(job_at(address), F16x16, U16x32)


def multiply_f32_lanes(address):
    """The same for fp32."""
    _multiply(job_at(address), U32x16, U32x16)


def unpack_bf16_lanes(address):
    """Rows of bf16 as patterns, one after the other."""
    _unpack(job_at(address), BF16x16, U16x32)


def unpack_f16_lanes(address):
    """The same for fp16."""
    _unpack(job_at(address), F16x16, U16x32)


def unpack_f32_lanes(address):
    """The same for fp32."""
    _unpack(job_at(address), U32x16, U32x16)


@_njit
def _multiply(job, kind, lanes):
    own = own_scratch(job)
    if job[place.TOKENS] == 1:
        _multiply_token(job, own, kind, lanes)
    else:
        _multiply_tokens(job, own, kind, lanes)


@_njit
def _multiply_token(job, own, kind, lanes):
    first, stop = next_block(job)
    while first < stop:
        for r in range(first, stop):
            mask = _decode_row(job, r, own, lanes)
            total = _dot(job, mask, own, ahead_of(job, r), kind)
            _put(job, r, total)
        first, stop = next_block(job)


@_njit
def _put(job, i, total):
    """Round a sum, and write it as item i of the result, [T, R]."""
    bits = job[place.BITS]
    number = np.float32(total + bias_of(job, i % job[place.ROWS]))
    pattern = pattern_of(number, bits, job[place.MANTISSA])
    if bits == 16:
        store(job[place.OUT] + 2 * i, np.uint16(pattern))
    else:
        store(job[place.OUT] + 4 * i, np.uint32(pattern))


@_njit
def _dot(job, mask, kept, ahead, kind):
    """The sum of the products of kept weights with the activations of their columns."""
    columns, item = job[place.COLUMNS], job[place.BITS] >> 3
    x = job[place.X]
    zero = splat(F32x16, np.float32(0))
    a, b, c, d = zero, zero, zero, zero
    for i in range(0, padded(columns), 64):
        prefetch(ahead + item * i)
        prefetch(ahead + item * i + 64)
        word = mask_word(mask, i, columns)
        if columns - i > 48:
            a = fused(_floats(word, kept, kind), load(F32x16, x + 4 * i), a)
            kept += item * _count(word)
            b = fused(_floats(word >> np.uint64(16), kept, kind), load(F32x16, x + 4 * i + 64), b)
            kept += item * _count(word >> np.uint64(16))
            c = fused(_floats(word >> np.uint64(32), kept, kind), load(F32x16, x + 4 * i + 128), c)
            kept += item * _count(word >> np.uint64(32))
            d = fused(_floats(word >> np.uint64(48), kept, kind), load(F32x16, x + 4 * i + 192), d)
            kept += item * _count(word >> np.uint64(48))
            continue
        for j in range(i, columns, 16):
            a = fused(_floats(word, kept, kind), load(F32x16, x + 4 * j), a)
            kept += item * _count(word)
            word >>= np.uint64(16)
    return add_lanes((a + b) + (c + d))


@_njit
def _count(word):
    """How many of the 16 lowest bits are set."""
    return count_ones(np.uint16(word))


@_njit
def _floats(word, kept, kind):
    """The weights of 16 columns, float32; the mask is the 16 lowest bits of a word."""
    return floats_of_patterns(expand(load(kind, kept), mask_of(M16, word)))


@_njit
def _multiply_tokens(job, own, kind, lanes):
    columns, rows, tokens = job[place.COLUMNS], job[place.ROWS], job[place.TOKENS]
    line = 4 * padded(columns)
    tile = own + _decoded_bytes(columns)
    scratch = tile + _TILE * line
    sums_at = scratch + tile_scratch(tokens)
    first, stop = next_block(job)
    while first < stop:
        for r in range(first, stop, _TILE):
            count = min(_TILE, stop - r)
            for i in range(count):
                mask = _decode_row(job, r + i, own, lanes)
                _spread_floats(job, mask, own, tile + i * line, ahead_of(job, r + i), kind)
            sums = array_at(sums_at, tokens * count, np.float32).reshape(tokens, count)
            multiply_floats(tile, line, job[place.X], line, scratch, sums)
            for t in range(tokens):
                for i in range(count):
                    _put(job, t * rows + r + i, sums[t, i])
        first, stop = next_block(job)


@_njit
def _spread_floats(job, mask, kept, target, ahead, kind):
    """Write a row as float32 to an address, and zeros to the end of its last vector."""
    columns, item = job[place.COLUMNS], job[place.BITS] >> 3
    for i in range(0, columns, 64):
        prefetch(ahead + item * i)
        prefetch(ahead + item * i + 64)
        word = mask_word(mask, i, columns)
        for j in range(i, min(i + 64, columns), 16):
            store(target + 4 * j, _floats(word, kept, kind))
            kept += item * _count(word)
            word >>= np.uint64(16)


@_njit
def _unpack(job, kind, lanes):
    own = own_scratch(job)
    line = job[place.COLUMNS] * (job[place.BITS] >> 3)
    first, stop = next_block(job)
    while first < stop:
        for i in range(first, stop):
            r = row_number(job, i)
            mask = _decode_row(job, r, own, lanes)
            _spread_patterns(job, mask, own, job[place.OUT] + i * line, ahead_of(job, r), kind)
        first, stop = next_block(job)


@_njit
def _spread_patterns(job, mask, kept, target, ahead, kind):
    """Write a row as patterns to an address, and nothing past its last column."""
    columns, item = job[place.COLUMNS], job[place.BITS] >> 3
    for i in range(0, columns, 64):
        prefetch(ahead + item * i)
        prefetch(ahead + item * i + 64)
        word = mask_word(mask, i, columns)
        for j in range(i, min(i + 64, columns), 16):
            weights = expand(load(kind, kept), mask_of(M16, word))
            if columns - j >= 16:
                store(target + item * j, weights)
            else:
                inside = np.uint32((1 << (columns - j)) - 1)
                store_some(target + item * j, weights, mask_of(M16, inside))
            kept += item * _count(word)
            word >>= np.uint64(16)


@_njit
def _decode_row(job, r, kept, lanes):
    """Decode the kept weights of row r to an address; returns the address of its mask.

    Scratch is behind them, see `_decoded_bytes`.
    """
    columns, bits = job[place.COLUMNS], job[place.BITS]
    stored = job[place.MANTISSA] - job[place.DROPPED]
    digits = kept + 4 * (columns + LANE_SLACK)
    own_mask = digits + whole_blocks(columns) + 4 * LANE_SLACK
    (k, base, escaped), length, (mask, values, codes, escapes) = find_parts(
        job, r, stored + 1, own_mask
    )
    if job[place.DIGITS]:
        look_up_codes(codes, length, job[place.CODE_TABLES], digits)
    decode_lanes(
        values,
        k,
        length if job[place.DIGITS] else k,
        digits,
        job[place.DIGIT_BITS],
        (bits, stored, job[place.DROPPED], base),
        job[place.VALUE_TABLES],
        lanes,
        kept,
    )
    item = bits >> 3
    for e in range(escaped):
        at = kept + item * escape_place(job, r, e)
        if item == 2:
            store(at, load(np.uint16, escapes + 2 * e))
        else:
            store(at, load(np.uint32, escapes + 4 * e))
    return mask


@_njit
def _decoded_bytes(columns):
    """Bytes of scratch of `_decode_row`: kept weights, digits of codes, a mask."""
    own_mask = whole_blocks(whole_blocks(columns) // 8)
    return (
        whole_blocks(4 * (columns + LANE_SLACK) + whole_blocks(columns) + 4 * LANE_SLACK) + own_mask
    )


@_njit
def _scratch_bytes(tokens, columns):
    """Bytes of scratch of a worker: a decoded row, a tile of rows, its product's, and sums."""
    tile = 4 * _TILE * padded(columns) if tokens > 1 else 0
    sums = tile_scratch(tokens) + whole_blocks(4 * tokens * _TILE)
    return _decoded_bytes(columns) + tile + sums


@_njit
def lanes_room(tokens, columns, threads):
    """Bytes of scratch for one product."""
    return 4 * tokens * padded(columns) + threads * _scratch_bytes(tokens, columns) + 64


@_njit
def start_multiply_lanes(arguments, x_TC, out_TR, bias_R, tables, worker, room, team):
    """Multiply tokens by held rows.

    Arguments are those of `emp_kernels.cpu.held_rows.start_multiply`, but for:
        worker: The address of a worker from here.
        room: uint8, scratch: `lanes_room` for T, C and the team's threads.
    """
    tokens, columns = x_TC.shape
    start = (room.ctypes.data + 63) // 64 * 64
    job = rows_job(arguments, tables, out_TR.ctypes.data)
    job[place.TOKENS], job[place.X] = tokens, start
    job[place.BIAS] = bias_R.ctypes.data if bias_R.size else 0
    write_floats(x_TC.reshape(-1), tokens, columns, job[place.MANTISSA], start)
    own = start + 4 * tokens * padded(columns)
    stride = _scratch_bytes(tokens, columns)
    run(job, worker, out_TR.shape[1], out_TR.size * columns, own, stride, team)


@_njit
def start_unpack_lanes(arguments, first, row_N, out_NC, tables, worker, room, team):
    """Decode held rows.

    Arguments are those of `emp_kernels.cpu.held_rows.start_unpack`, but for those that
    `start_multiply_lanes` names; `room` is for no tokens.
    """
    rows, columns = out_NC.shape
    start = (room.ctypes.data + 63) // 64 * 64
    job = rows_job(arguments, tables, out_NC.ctypes.data)
    job[place.FIRST_ROW] = first
    job[place.ROW_LIST] = row_N.ctypes.data if row_N.size else 0
    run(job, worker, rows, out_NC.size, start, _scratch_bytes(0, columns), team)
