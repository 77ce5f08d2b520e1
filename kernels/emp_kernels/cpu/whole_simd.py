"""Decodes and multiplies whole records with AVX-512, some weights of a record at a time.

Legend as in `emp_kernels.cpu.whole_steps` and `emp_kernels.cpu.whole_job`.
"""

import numba
import numpy as np

from emp_kernels.cpu import held_job as place
from emp_kernels.cpu.avx512 import dot_bf16
from emp_kernels.cpu.team import array_at
from emp_kernels.cpu.vectors import F32x16, U16x32, add_lanes, load, prefetch, splat, store
from emp_kernels.cpu.whole_job import (
    ESCAPE,
    PART_BYTES,
    SHORT,
    TIERS,
    VALUE_BITS,
    find_part,
    part_arrays,
    reached_of,
    record_bytes,
    width_of,
)
from emp_kernels.cpu.whole_steps import (
    LANES,
    load_tables,
    read_tier,
    step_floats,
    step_halves,
    step_words,
)

__all__ = ["LANES", "decode_part", "multiply_part", "part_scratch"]

_njit = numba.njit(nogil=True, cache=True, error_model="numpy")

_EDGE_BYTES = 4 * LANES


@_njit
def part_scratch(weights):
    """Bytes of scratch for decoding a part of a record of so many weights, a multiple of 64."""
    return PART_BYTES + _EDGE_BYTES + 2 * _room(weights)


@_njit
def _room(weights):
    """Bytes for a symbol of each weight, and for two steps more."""
    return (weights // LANES + 3) * LANES


@_njit
def _start(job, own, record, first, stop):
    """Find a part of a record, and decode all tiers of it but the first.

    Returns:
        `cursor` at the weight from[0], and `record`, see `emp_kernels.cpu.whole_steps`.
    """
    data, reached_T = record_bytes(job, record), reached_of(job, record)
    part = part_arrays(own)
    find_part(job, data, reached_T, first, stop, part)
    starts_T, from_T, to_T, skip_T = part
    tiers, n = job[TIERS], np.int64(reached_T[0])
    to, other = own + PART_BYTES, own + PART_BYTES + _room(n)
    base, symbols = job[ESCAPE], np.int64(0)
    for t in range(tiers - 1, 0, -1):
        width = width_of(job, t)
        base -= (1 << width) - 1
        read_tier(
            data.ctypes.data + starts_T[t] + from_T[t] // 8,
            (np.int64(reached_T[t]) + 7) >> 3,
            width,
            to_T[t] - from_T[t],
            base,
            symbols,
            to,
        )
        symbols = to + skip_T[t]
        to, other = other, to
    cursor = (
        data.ctypes.data + (2 * n if job[VALUE_BITS] == 24 else 0) + from_T[0],
        data.ctypes.data + starts_T[0] + from_T[0] // 8,
        symbols,
        data.ctypes.data + starts_T[tiers] + from_T[tiers],
    )
    escaping = reached_T[tiers] > 0
    return cursor, ((n + 7) >> 3, width_of(job, 0), tiers > 1, escaping, n)


@_njit
def _next_record(job, record):
    """The address of the record behind one, and how many bytes of that one a step takes.

    The CPU does not see by itself what comes next: a record is read from several places at once,
    and each of them for some pages only.
    """
    data, offsets = (
        record_bytes(job, record),
        array_at(job[place.OFFSETS] + 8 * record, 2, np.int64),
    )
    size, n = offsets[1] - offsets[0], np.int64(reached_of(job, record)[0])
    return data.ctypes.data + size, LANES * size // n + 1


@_njit
def _prefetch_some(at, nbytes):
    """Begin to read so many bytes."""
    for line in range(at, at + nbytes, 64):
        prefetch(line)


@_njit
def decode_part(job, own, record, first, stop, out):
    """Decode some weights of a record.

    Args:
        job: The job.
        own: Address of scratch, of `part_scratch`.
        record: The record's number.
        first: The first weight.
        stop: The weight past the last.
        out: Address of uint16 or uint32 [stop − first], written.
    """
    cursor, fixed = _start(job, own, record, first, stop)
    tables = load_tables(job[SHORT], job[ESCAPE])
    item, edge = job[place.BITS] // 8, own + PART_BYTES + 2 * _room(fixed[4])
    for start in range(first // LANES * LANES, stop, LANES):
        whole = start >= first and start + LANES <= stop
        to = out + item * (start - first) if whole else edge
        if item == 4:
            quarters, cursor = step_floats(cursor, fixed, tables)
            store(to, quarters[0])
            store(to + 64, quarters[1])
            store(to + 128, quarters[2])
            store(to + 192, quarters[3])
        else:
            if job[place.MANTISSA] == 7:
                low, high, cursor = step_words(cursor, fixed, tables)
            else:
                low, high, cursor = step_halves(cursor, fixed, tables)
            store(to, low)
            store(to + 64, high)
        if not whole:
            skipped = max(first - start, 0)
            nbytes = item * (min(stop - start, LANES) - skipped)
            target = array_at(out + item * (start + skipped - first), nbytes, np.uint8)
            target[:] = array_at(edge + item * skipped, nbytes, np.uint8)


@_njit
def multiply_part(job, own, record, first, stop, out_R):
    """Multiply one token, bfloat16, by some rows of a record, whose length is a multiple of 64.

    Args:
        job: The job; X is the address of the token's activations.
        own: Address of scratch, of `part_scratch`.
        record: The record's number.
        first: The first weight, which starts a row.
        stop: The weight past the last.
        out_R: float32, the sums, written.
    """
    cursor, fixed = _start(job, own, record, first, stop)
    tables = load_tables(job[SHORT], job[ESCAPE])
    columns, x = job[place.COLUMNS], job[place.X]
    ahead, stride = _next_record(job, record)
    zeros = splat(F32x16, np.float32(0))
    for r in range(out_R.size):
        a, b, c, d = zeros, zeros, zeros, zeros
        for j in range(0, columns, 2 * LANES):
            _prefetch_some(ahead, 2 * stride)
            ahead += 2 * stride
            low, high, cursor = step_words(cursor, fixed, tables)
            a = dot_bf16(a, low, load(U16x32, x + 2 * j))
            b = dot_bf16(b, high, load(U16x32, x + 2 * j + 64))
            if j + LANES < columns:
                low, high, cursor = step_words(cursor, fixed, tables)
                c = dot_bf16(c, low, load(U16x32, x + 2 * j + 128))
                d = dot_bf16(d, high, load(U16x32, x + 2 * j + 192))
        out_R[r] = add_lanes((a + b) + (c + d))
