"""Decodes and multiplies whole records with AVX-512, some weights of a record at a time.

Legend as in `emp_kernels.cpu.whole_steps` and `emp_kernels.cpu.whole_job`.
"""

import numba
import numpy as np

from emp_kernels.cpu import held_job as place
from emp_kernels.cpu.avx512 import dot_bf16, floats_of_patterns
from emp_kernels.cpu.team import array_at
from emp_kernels.cpu.vectors import (
    BF16x16,
    F16x16,
    F32x16,
    U16x32,
    add_lanes,
    load,
    prefetch,
    splat,
    store,
)
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

__all__ = [
    "LANES",
    "MOST_TOKENS",
    "decode_part",
    "multiply_part",
    "multiply_part_by_some",
    "part_scratch",
    "widen_part",
]

_njit = numba.njit(nogil=True, cache=True, error_model="numpy")

_EDGE_BYTES = 4 * LANES


MOST_TOKENS = 8
"""Tokens whose products are best made while weights are decoded: more sums fill all registers."""


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
def _prefetch_step(at, stride):
    """Begin to read `stride` bytes, at most two lines of the cache."""
    prefetch(at)
    prefetch(at + stride // 2)


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
            _prefetch_step(ahead, stride)
            _prefetch_step(ahead + stride, stride)
            ahead += 2 * stride
            low, high, cursor = step_words(cursor, fixed, tables)
            a = dot_bf16(a, low, load(U16x32, x + 2 * j))
            b = dot_bf16(b, high, load(U16x32, x + 2 * j + 64))
            if j + LANES < columns:
                low, high, cursor = step_words(cursor, fixed, tables)
                c = dot_bf16(c, low, load(U16x32, x + 2 * j + 128))
                d = dot_bf16(d, high, load(U16x32, x + 2 * j + 192))
        out_R[r] = add_lanes((a + b) + (c + d))


@_njit
def _add_four(sums, low, high, x, stride):
    """Add the products of 64 weights and four tokens that lie `stride` bytes apart."""
    first = dot_bf16(dot_bf16(sums[0], low, load(U16x32, x)), high, load(U16x32, x + 64))
    x += stride
    second = dot_bf16(dot_bf16(sums[1], low, load(U16x32, x)), high, load(U16x32, x + 64))
    x += stride
    third = dot_bf16(dot_bf16(sums[2], low, load(U16x32, x)), high, load(U16x32, x + 64))
    x += stride
    fourth = dot_bf16(dot_bf16(sums[3], low, load(U16x32, x)), high, load(U16x32, x + 64))
    return first, second, third, fourth


@_njit
def _write_four(sums, r, first, sums_TR):
    """Write the sums of four tokens with row r, as far as there are so many."""
    for t in range(first, min(first + 4, sums_TR.shape[0])):
        sums_TR[t, r] = add_lanes(sums[t - first])


@_njit
def multiply_part_by_some(job, own, record, first, stop, token_bytes, sums_TR):
    """The same for up to MOST_TOKENS; X has whole fours of them.

    Args:
        job: As for `multiply_part`.
        own: The same.
        record: The same.
        first: The same.
        stop: The same.
        token_bytes: Bytes from a token's activations to the next one's.
        sums_TR: float32 [tokens, rows], the sums, written.
    """
    cursor, fixed = _start(job, own, record, first, stop)
    tables = load_tables(job[SHORT], job[ESCAPE])
    tokens, rows = sums_TR.shape
    x, size = job[place.X], 2 * job[place.COLUMNS]
    ahead, stride = _next_record(job, record)
    zero = splat(F32x16, np.float32(0))
    zeros = zero, zero, zero, zero
    for r in range(rows):
        a, b = zeros, zeros
        for at in range(x, x + size, 2 * LANES):
            _prefetch_step(ahead, stride)
            ahead += stride
            low, high, cursor = step_words(cursor, fixed, tables)
            a = _add_four(a, low, high, at, token_bytes)
            if tokens > 4:
                b = _add_four(b, low, high, at + 4 * token_bytes, token_bytes)
        _write_four(a, r, 0, sums_TR)
        _write_four(b, r, 4, sums_TR)


@_njit
def widen_part(patterns, floats, weights, bfloats):
    """Convert patterns of 16 bits at an address to float32 at another, in whole vectors.

    Args:
        patterns: Address of the patterns.
        floats: Address to write to.
        weights: How many.
        bfloats: Whether they are bfloat16; otherwise they are float16.
    """
    for j in range(0, weights, 16):
        if bfloats:
            numbers = floats_of_patterns(load(BF16x16, patterns + 2 * j))
        else:
            numbers = floats_of_patterns(load(F16x16, patterns + 2 * j))
        store(floats + 4 * j, numbers)
