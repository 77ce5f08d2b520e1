"""Multiplies and unpacks whole records that are held in memory.

Products of bfloat16 with a few tokens decode and multiply in one pass, where the CPU has the
instructions and a row has a multiple of 64 weights. All others decode the rows of a record to
scratch, and multiply them there. Either way they are decoded once for all tokens. Sums are float32;
the bias is added to them at the end, and they are rounded once.

Functions with "any" in their names run on any CPU and with every code, those with "short" need
AVX-512 and a code that `emp_kernels.whole_tables.short_of` has a table for, and those with "bf16"
besides instructions for bfloat16, and such weights. Those that take nothing but an address are
workers, see `emp_kernels.cpu.team`. Their row blocks are records, or single rows where a list of
rows is given.

Legend: own is the address of a thread's scratch: what decoding needs, then what tiles need, sums
by token and row, the weights of a record as patterns, and as float32.
"""

import numba
import numpy as np

from emp_kernels.cpu import held_job as place
from emp_kernels.cpu.dense_tile import VECTOR_BYTES, multiply_floats, multiply_words, tile_scratch
from emp_kernels.cpu.floats import floats_of, pattern_of
from emp_kernels.cpu.held_rows import bias_of, new_job
from emp_kernels.cpu.team import array_at, job_at, next_block, own_scratch, run
from emp_kernels.cpu.whole_job import ORIGIN, RECORD, SIMD, STOP_ROW, range_of
from emp_kernels.cpu.whole_simd import (
    LANES,
    MOST_TOKENS,
    decode_part,
    multiply_part,
    multiply_part_by_some,
    part_scratch,
    widen_part,
)
from emp_kernels.cpu.whole_unpack import any_part_scratch, decode_any_part

__all__ = [
    "multiply_any_whole",
    "multiply_bf16_whole",
    "multiply_short_whole",
    "start_multiply_whole",
    "start_unpack_whole",
    "unpack_any_whole",
    "unpack_short_whole",
    "whole_room",
]

_njit = numba.njit(nogil=True, cache=True, error_model="numpy")


@_njit
def _filled(nbytes):
    """Bytes, up to a whole vector."""
    return (nbytes + VECTOR_BYTES - 1) // VECTOR_BYTES * VECTOR_BYTES


@_njit
def _token_bytes(nbytes):
    """Bytes from a token's activations to the next one's: never a power of two.

    Else those of all tokens would compete for the same few lines of the cache.
    """
    return _filled(nbytes) + VECTOR_BYTES


@_njit
def _fours(tokens):
    """As many tokens, up to a multiple of four; but one alone."""
    return 1 if tokens == 1 else (tokens + 3) // 4 * 4


@_njit
def _decode_bytes(record):
    """Scratch for decoding records of so many weights."""
    return max(any_part_scratch(record), part_scratch(record))


@_njit
def _scratch_bytes(record, columns, tokens):
    """Bytes of scratch of a thread."""
    sums = _filled(4 * tokens * (record // columns))
    weights = 2 * _filled(4 * record) if tokens else 0
    return _decode_bytes(record) + tile_scratch(tokens) + sums + weights


@_njit
def whole_room(record, columns, tokens, threads):
    """Bytes of scratch for a product, or, with no tokens, for unpacking."""
    return (
        VECTOR_BYTES
        + _fours(tokens) * _token_bytes(4 * columns)
        + threads * _scratch_bytes(record, columns, tokens)
    )


# ── products ──


def multiply_any_whole(address):
    """Products of whole records, for any CPU."""
    job = job_at(address)
    own = own_scratch(job)
    first, stop = next_block(job)
    while first < stop:
        for unit in range(first, stop):
            _multiply_any(job, own, unit)
        first, stop = next_block(job)


def multiply_short_whole(address):
    """The same with AVX-512."""
    job = job_at(address)
    own = own_scratch(job)
    first, stop = next_block(job)
    while first < stop:
        for unit in range(first, stop):
            _multiply_short(job, own, unit)
        first, stop = next_block(job)


def multiply_bf16_whole(address):
    """The same of bfloat16 with instructions for it."""
    job = job_at(address)
    own = own_scratch(job)
    first, stop = next_block(job)
    while first < stop:
        for unit in range(first, stop):
            _multiply_bf16(job, own, unit)
        first, stop = next_block(job)


@_njit
def _weights_at(job, own):
    """The addresses in scratch of what tiles need, of sums, of patterns and of floats."""
    tile = own + _decode_bytes(job[RECORD])
    sums = tile + tile_scratch(job[place.TOKENS])
    patterns = sums + _filled(4 * job[place.TOKENS] * (job[RECORD] // job[place.COLUMNS]))
    return tile, sums, patterns, patterns + _filled(4 * job[RECORD])


@_njit
def _sums_of(job, sums, first, stop):
    """The sums of tokens with the rows of so many weights, float32 [tokens, rows]."""
    tokens, rows = job[place.TOKENS], (stop - first) // job[place.COLUMNS]
    return array_at(sums, tokens * rows, np.float32).reshape(tokens, rows)


@_njit
def _multiply_any(job, own, unit):
    record, first, stop = range_of(job, 0, job[place.ROWS], unit)
    _, _, patterns, floats = _weights_at(job, own)
    n = stop - first
    if job[place.BITS] == 16:
        pattern_N = array_at(patterns, n, np.uint16)
        decode_any_part(job, own, record, first, stop, pattern_N)
        floats_of(pattern_N, job[place.MANTISSA], array_at(floats, n, np.float32))
    else:
        decode_any_part(job, own, record, first, stop, array_at(floats, n, np.uint32))
    _multiply_floats(job, own, record, first, stop)


@_njit
def _multiply_short(job, own, unit):
    record, first, stop = range_of(job, 0, job[place.ROWS], unit)
    _, _, patterns, floats = _weights_at(job, own)
    if job[place.BITS] == 16:
        decode_part(job, own, record, first, stop, patterns)
        widen_part(patterns, floats, stop - first, job[place.MANTISSA] == 7)
    else:
        decode_part(job, own, record, first, stop, floats)
    _multiply_floats(job, own, record, first, stop)


@_njit
def _multiply_floats(job, own, record, first, stop):
    """Multiply weights of a record that lie in scratch as float32."""
    tile, sums, _, floats = _weights_at(job, own)
    row_bytes = 4 * job[place.COLUMNS]
    sums_TR = _sums_of(job, sums, first, stop)
    multiply_floats(floats, row_bytes, job[place.X], _token_bytes(row_bytes), tile, sums_TR)
    _write_sums(job, record, first, sums_TR)


@_njit
def _multiply_bf16(job, own, unit):
    record, first, stop = range_of(job, 0, job[place.ROWS], unit)
    tokens, row_bytes = job[place.TOKENS], 2 * job[place.COLUMNS]
    tile, sums, patterns, _ = _weights_at(job, own)
    sums_TR = _sums_of(job, sums, first, stop)
    if tokens == 1 and row_bytes % (2 * LANES) == 0:
        multiply_part(job, own, record, first, stop, sums_TR[0])
    elif tokens <= MOST_TOKENS and row_bytes % (2 * LANES) == 0:
        multiply_part_by_some(job, own, record, first, stop, _token_bytes(row_bytes), sums_TR)
    else:
        decode_part(job, own, record, first, stop, patterns)
        multiply_words(patterns, row_bytes, job[place.X], _token_bytes(row_bytes), tile, sums_TR)
    _write_sums(job, record, first, sums_TR)


@_njit
def _write_sums(job, record, first, sums_TR):
    """Add the bias to sums, round them, and write them to the result."""
    if job[place.BITS] == 16:
        _write_rounded(job, record, first, sums_TR, np.uint16)
    else:
        _write_rounded(job, record, first, sums_TR, np.uint32)


@_njit
def _write_rounded(job, record, first, sums_TR, dtype):
    tokens, rows = sums_TR.shape
    out = array_at(job[place.OUT], tokens * job[place.ROWS], dtype)
    at = (record * job[RECORD] + first) // job[place.COLUMNS] - job[ORIGIN]
    for r in range(rows):
        bias = bias_of(job, at + r)
        for t in range(tokens):
            total = np.float32(sums_TR[t, r] + bias)
            out[t * job[place.ROWS] + at + r] = pattern_of(
                total, job[place.BITS], job[place.MANTISSA]
            )


# ── rows ──


def unpack_any_whole(address):
    """Rows of whole records as patterns, for any CPU."""
    job = job_at(address)
    own = own_scratch(job)
    first, stop = next_block(job)
    while first < stop:
        for unit in range(first, stop):
            record, start, end, out = _wanted(job, unit)
            if job[place.BITS] == 16:
                decode_any_part(job, own, record, start, end, array_at(out, end - start, np.uint16))
            else:
                decode_any_part(job, own, record, start, end, array_at(out, end - start, np.uint32))
        first, stop = next_block(job)


def unpack_short_whole(address):
    """The same with AVX-512."""
    job = job_at(address)
    own = own_scratch(job)
    first, stop = next_block(job)
    while first < stop:
        for unit in range(first, stop):
            record, start, end, out = _wanted(job, unit)
            decode_part(job, own, record, start, end, out)
        first, stop = next_block(job)


@_njit
def _wanted(job, unit):
    """What is to be decoded: (record, first weight, weight past the last, where it goes)."""
    columns, first_row, stop_row, item = job[place.COLUMNS], 0, 0, job[place.BITS] // 8
    if job[place.ROW_LIST]:
        row = array_at(job[place.ROW_LIST] + 8 * unit, 1, np.int64)[0]
        record, first, stop = range_of(job, row, row + 1, 0)
        return record, first, stop, job[place.OUT] + unit * columns * item
    first_row, stop_row = job[place.FIRST_ROW], job[STOP_ROW]
    record, first, stop = range_of(job, first_row, stop_row, unit)
    before = record * job[RECORD] + first - (job[ORIGIN] + first_row) * columns
    return record, first, stop, job[place.OUT] + before * item


# ── what starts them ──


@_njit
def _units(job, first_row, stop_row):
    """How many records hold a range of rows."""
    if first_row == stop_row:
        return 0
    columns, origin = job[place.COLUMNS], job[ORIGIN]
    last = ((origin + stop_row) * columns - 1) // job[RECORD]
    return last - (origin + first_row) * columns // job[RECORD] + 1


@_njit
def _write_tokens(job, x_TC, words, start):
    """Write the activations of tokens to an address, each token padded, and tokens of zeros.

    Args:
        job: The job.
        x_TC: uint16 or uint32 [T, C].
        words: Whether they stay patterns; otherwise they become float32.
        start: The address, of room for `_fours` of such tokens.
    """
    tokens, columns = x_TC.shape
    item = x_TC.itemsize if words else 4
    room = _token_bytes(item * columns)
    array_at(start, _fours(tokens) * room, np.uint8)[:] = 0
    for t in range(tokens):
        if words:
            array_at(start + t * room, columns, np.uint16)[:] = x_TC[t]
        else:
            floats_of(x_TC[t], job[place.MANTISSA], array_at(start + t * room, columns, np.float32))


@_njit
def start_multiply_whole(arguments, x_TC, out_TR, bias_R, worker, words, simd, room, team):
    """Multiply tokens by held rows; all arrays are C-contiguous.

    Args:
        arguments: `HeldWhole.arguments`.
        x_TC: uint16 or uint32 [T, C], the tokens' activations, patterns.
        out_TR: As many [T, R], written.
        bias_R: As many [R], or none, [0].
        worker: The address of one of the workers for products.
        words: Whether that takes activations as they are: `multiply_bf16_whole` does.
        simd: Whether to use instructions that not every CPU has.
        room: uint8, scratch: `whole_room`.
        team: As for `emp_kernels.cpu.team.run`.
    """
    tokens, columns = x_TC.shape
    job = new_job(arguments, out_TR.ctypes.data)
    start = (room.ctypes.data + 63) // 64 * 64
    job[SIMD], job[place.TOKENS], job[place.X] = simd, tokens, start
    job[place.BIAS] = bias_R.ctypes.data if bias_R.size else 0
    if words and columns % LANES == 0 and tokens == 1:
        job[place.X] = x_TC.ctypes.data
    else:
        _write_tokens(job, x_TC, words, start)
    run(
        job,
        worker,
        _units(job, 0, out_TR.shape[1]),
        out_TR.size * columns,
        start + _fours(tokens) * _token_bytes(4 * columns),
        _scratch_bytes(job[RECORD], columns, tokens),
        team,
    )


@_njit
def start_unpack_whole(arguments, first, row_N, out_NC, worker, simd, room, team):
    """Decode held rows.

    Args:
        arguments: `HeldWhole.arguments`.
        first: The first row, if no numbers are given.
        row_N: int64 [N], the rows' numbers, or none, [0]; C-contiguous.
        out_NC: uint16 or uint32 [N, C], C-contiguous, written.
        worker: The address of one of the workers for rows.
        simd: As for `start_multiply_whole`.
        room: uint8, scratch: `whole_room` for no tokens.
        team: As for `emp_kernels.cpu.team.run`.
    """
    rows, columns = out_NC.shape
    job = new_job(arguments, out_NC.ctypes.data)
    job[SIMD], job[place.FIRST_ROW], job[STOP_ROW] = simd, first, first + rows
    job[place.ROW_LIST] = row_N.ctypes.data if row_N.size else 0
    start = (room.ctypes.data + 63) // 64 * 64
    units = rows if row_N.size else _units(job, first, first + rows)
    run(job, worker, units, out_NC.size, start, _scratch_bytes(job[RECORD], columns, 0), team)
