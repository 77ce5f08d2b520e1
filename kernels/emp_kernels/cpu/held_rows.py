"""Multiplies and unpacks rows that are held packed, on any CPU: one row after the other.

Each row is decoded to scratch by the steps of `emp_kernels.cpu.unpack`. Its sums are float32, in
sixteen lanes; the lanes are added at the end, and the bias; then the sum is rounded once.

The functions without an underscore are workers, see `emp_kernels.cpu.team`.
"""

import numba
import numpy as np

from emp_kernels.cpu import held_job as place
from emp_kernels.cpu.floats import float_of, floats_of, pattern_of
from emp_kernels.cpu.pack import SCRATCH_SLACK
from emp_kernels.cpu.team import (
    FIRST_FREE,
    JOB_SIZE,
    array_at,
    job_at,
    next_block,
    own_scratch,
    run,
)
from emp_kernels.cpu.unpack import decode_row, spread_row
from emp_kernels.cpu.vectors import F32x16, add_lanes, fused, load, splat

__all__ = [
    "multiply_any_rows",
    "multiply_room",
    "start_multiply",
    "start_unpack",
    "unpack_any_rows",
]

_njit = numba.njit(nogil=True, cache=True, error_model="numpy")

LANES = 16


@_njit
def scratch_bytes(columns):
    """Bytes of scratch that a worker here needs for rows of so many weights, a multiple of 64.

    That is a row as patterns and as float32, its kept weights, their distances and codes.
    """
    return 5 * _part(columns)


def multiply_any_rows(address):
    """The products of rows with tokens, whose float32 are at X."""
    job = job_at(address)
    own = own_scratch(job)
    if job[place.BITS] == 16:
        _multiply_blocks(job, own, np.uint16)
    else:
        _multiply_blocks(job, own, np.uint32)


def unpack_any_rows(address):
    """Rows as patterns, one after the other."""
    job = job_at(address)
    own = own_scratch(job)
    if job[place.BITS] == 16:
        _unpack_blocks(job, own, np.uint16)
    else:
        _unpack_blocks(job, own, np.uint32)


@_njit
def padded(columns):
    """Items of a token's activations, zeros behind them included: whole vectors of float32."""
    return (columns + LANES - 1) // LANES * LANES


@_njit
def write_floats(x_N, tokens, columns, mantissa, address):
    """Write the activations of tokens, patterns, as float32 to an address, each token padded."""
    for t in range(tokens):
        float_C = array_at(address + 4 * t * padded(columns), padded(columns), np.float32)
        floats_of(x_N[t * columns : (t + 1) * columns], mantissa, float_C)
        float_C[columns:] = 0


@_njit
def bias_of(job, r):
    """The bias of a row, float32; 0 if there is none."""
    if not job[place.BIAS]:
        return np.float32(0)
    if job[place.BITS] == 16:
        pattern = np.uint32(array_at(job[place.BIAS], job[place.ROWS], np.uint16)[r])
    else:
        pattern = array_at(job[place.BIAS], job[place.ROWS], np.uint32)[r]
    return float_of(pattern, job[place.BITS], job[place.MANTISSA])


@_njit
def _multiply_blocks(job, own, dtype):
    columns, rows, tokens = job[place.COLUMNS], job[place.ROWS], job[place.TOKENS]
    row_C = array_at(own, columns, dtype)
    float_C = array_at(own + _part(columns), padded(columns), np.float32)
    float_C[columns:] = 0
    out = array_at(job[place.OUT], tokens * rows, dtype)
    first, stop = next_block(job)
    while first < stop:
        for r in range(first, stop):
            _decode(job, r, own + 2 * _part(columns), row_C)
            floats_of(row_C, job[place.MANTISSA], float_C)
            bias = bias_of(job, r)
            for t in range(tokens):
                total = _dot(float_C.ctypes.data, job[place.X] + 4 * t * padded(columns), columns)
                out[t * rows + r] = pattern_of(
                    np.float32(total + bias), job[place.BITS], job[place.MANTISSA]
                )
        first, stop = next_block(job)


@_njit
def _dot(row, x, columns):
    """The sum of the products of so many float32 at two addresses, each padded."""
    sums = splat(F32x16, np.float32(0))
    for c in range(0, columns, LANES):
        sums = fused(load(F32x16, row + 4 * c), load(F32x16, x + 4 * c), sums)
    return add_lanes(sums)


@_njit
def _unpack_blocks(job, own, dtype):
    columns = job[place.COLUMNS]
    first, stop = next_block(job)
    while first < stop:
        for i in range(first, stop):
            target = job[place.OUT] + i * columns * job[place.BITS] // 8
            _decode(job, row_number(job, i), own, array_at(target, columns, dtype))
        first, stop = next_block(job)


@_njit
def row_number(job, i):
    """Which row is to be unpacked to line i of the result."""
    if job[place.ROW_LIST]:
        return array_at(job[place.ROW_LIST] + 8 * i, 1, np.int64)[0]
    return job[place.FIRST_ROW] + i


@_njit
def _decode(job, r, own, row_C):
    """Decode row r to row_C; scratch is at `own`, of `scratch_bytes` less two parts."""
    columns, bits, mantissa = job[place.COLUMNS], job[place.BITS], job[place.MANTISSA]
    dtype = row_C.dtype
    room = columns + SCRATCH_SLACK
    kept_K = array_at(own, room, dtype)
    delta_K = array_at(own + _part(columns), room, dtype)
    code_K = array_at(own + 2 * _part(columns), room, np.uint8)
    payload = array_at(job[place.PAYLOAD], job[place.PAYLOAD_SIZE], np.uint8)
    line = array_at(job[place.TABLE] + 12 * r, 3, np.uint32)
    k, escaped, base = np.int64(line[0]), np.int64(line[1]), np.int64(line[2])
    at = array_at(job[place.OFFSETS] + 8 * r, 1, np.int64)[0]
    key_mask = (1 << (bits - 1)) - 1
    stored = mantissa - job[place.DROPPED]
    decode_row(
        payload,
        at,
        section_lengths(job, k),
        (k, escaped, base),
        (row_C.dtype.type(key_mask), key_mask >> mantissa << mantissa, bits, 0, 0.0),
        (
            job[place.DROPPED],
            stored,
            job[place.RADIX],
            job[place.DIGITS],
            (job[place.RADIX] << stored) - 1,
            job[place.ALIGN],
        ),
        kept_K,
        delta_K,
        code_K,
    )
    spread_row(kept_K, k, payload, at, row_C, False)


@_njit
def section_lengths(job, k):
    """Bytes of the mask, the values and the codes of a row that keeps k weights."""
    columns, align, digits = job[place.COLUMNS], job[place.ALIGN], job[place.DIGITS]
    width = job[place.MANTISSA] - job[place.DROPPED] + 1
    mask = (columns + 7) // 8 if 0 < k < columns else 0
    codes = (k + digits - 1) // digits if digits else 0
    return (
        (mask + align - 1) // align * align,
        ((k * width + 7) // 8 + align - 1) // align * align,
        (codes + align - 1) // align * align,
    )


@_njit
def _part(columns):
    """Bytes of scratch for four bytes a weight and what is read past the last one."""
    return (4 * (columns + SCRATCH_SLACK) + 63) // 64 * 64


@_njit
def start_multiply(arguments, x_TC, out_TR, bias_R, tables, worker, room, team):
    """Multiply tokens by held rows; all arrays are C-contiguous.

    Args:
        arguments: `HeldRows.arguments`.
        x_TC: uint16 or uint32 [T, C], the tokens' activations, patterns.
        out_TR: As many [T, R], written.
        bias_R: As many [R], or none, [0].
        tables: What other workers than those here need to know of the layout: `code_tables` and the
            bits of a digit there, see `emp_kernels.cpu.byte_planes`; `value_tables`, see
            `emp_kernels.cpu.lanes`.
        worker: The address of `multiply_any_rows`.
        room: uint8, scratch: `multiply_room` for T, C and the team's threads.
        team: As for `emp_kernels.cpu.team.run`.
    """
    tokens, columns = x_TC.shape
    job = rows_job(arguments, tables, out_TR.ctypes.data)
    start = (room.ctypes.data + 63) // 64 * 64
    job[place.TOKENS], job[place.X] = tokens, start
    job[place.BIAS] = bias_R.ctypes.data if bias_R.size else 0
    write_floats(x_TC.reshape(-1), tokens, columns, job[place.MANTISSA], start)
    run(
        job,
        worker,
        out_TR.shape[1],
        out_TR.size * columns,
        start + 4 * tokens * padded(columns),
        scratch_bytes(columns),
        team,
    )


@_njit
def multiply_room(tokens, columns, threads):
    """Bytes of scratch for one product."""
    return 4 * tokens * padded(columns) + threads * scratch_bytes(columns) + 64


@_njit
def start_unpack(arguments, first, row_N, out_NC, tables, worker, room, team):
    """Decode held rows.

    Args:
        arguments: `HeldRows.arguments`.
        first: The first row, if no numbers are given.
        row_N: int64 [N], the rows' numbers, or none, [0]; C-contiguous.
        out_NC: uint16 or uint32 [N, C], C-contiguous, written.
        tables: As for `start_multiply`.
        worker: The address of `unpack_any_rows`.
        room: uint8, scratch: `multiply_room` for no tokens.
        team: As for `emp_kernels.cpu.team.run`.
    """
    rows, columns = out_NC.shape
    job = rows_job(arguments, tables, out_NC.ctypes.data)
    job[place.FIRST_ROW] = first
    job[place.ROW_LIST] = row_N.ctypes.data if row_N.size else 0
    start = (room.ctypes.data + 63) // 64 * 64
    run(job, worker, rows, out_NC.size, start, scratch_bytes(columns), team)


@_njit
def rows_job(arguments, tables, out):
    """The job of a worker on pruned rows."""
    codes, digit_bits, values = tables
    job = new_job(arguments, out)
    job[place.CODE_TABLES], job[place.DIGIT_BITS] = codes.ctypes.data, digit_bits
    job[place.VALUE_TABLES] = values.ctypes.data
    return job


@_njit
def new_job(arguments, out):
    """A job that says what is held, and where the result goes."""
    job = np.zeros(JOB_SIZE, np.int64)
    job[FIRST_FREE : FIRST_FREE + arguments.size] = arguments
    job[place.OUT] = out
    return job
