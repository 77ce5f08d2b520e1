"""Unpacks whole records to weights on any CPU: some weights of a record, in passes over scratch.

Nothing is checked: `emp_kernels.cpu.whole_check` does that first. Legend as in
`emp_kernels.cpu.whole_pack` and `emp_kernels.cpu.whole_job`.
"""

import numba
import numpy as np

from emp_kernels.cpu import held_job as place
from emp_kernels.cpu.bit_steps import LANES, add_past, add_stripe, load_word, look_up, set_stripe
from emp_kernels.cpu.select import STRETCH, count_ties
from emp_kernels.cpu.team import array_at
from emp_kernels.cpu.whole_job import (
    CONTEXT_BITS,
    ESCAPE,
    ESCAPE_BYTES,
    EXPONENTS,
    PART_BYTES,
    SIMD,
    TIERS,
    VALUE_BITS,
    find_part,
    part_arrays,
    reached_of,
    record_bytes,
    width_of,
)
from emp_kernels.whole_tables import LIST_ROOM

__all__ = ["any_part_scratch", "decode_any_part"]

_njit = numba.njit(nogil=True, cache=True, error_model="numpy")

_EVERYTHING = np.uint8(255)


@_njit
def any_part_scratch(weights):
    """Bytes of scratch for decoding a part of a record of so many weights, a multiple of 64."""
    return PART_BYTES + 2 * _room(weights)


@_njit
def _room(weights):
    """Bytes for a code of each weight, and for two steps more."""
    return (weights // LANES + 3) * LANES


@_njit
def decode_any_part(job, own, record, first, stop, out_N):
    """Decode some weights of a record.

    Args:
        job: The job.
        own: Address of scratch, of `any_part_scratch`.
        record: The record's number.
        first: The first weight.
        stop: The weight past the last.
        out_N: uint16 or uint32 [stop − first], written.
    """
    data, reached_T = record_bytes(job, record), reached_of(job, record)
    n, value_bits = np.int64(reached_T[0]), job[VALUE_BITS]
    part = part_arrays(own)
    find_part(job, data, reached_T, first, stop, part)
    starts_T, from_T, _, skip_T = part
    room = _room(n)
    code_N = array_at(own + PART_BYTES, room, np.uint8)
    further_N = array_at(own + PART_BYTES + room, room, np.uint8)
    place_N, left_N = _read_tiers(job, data, reached_T, part, code_N, further_N)
    before = count_ties(place_N[: skip_T[0]], _EVERYTHING, np.uint8(job[ESCAPE]))
    escapes_at = starts_T[job[TIERS]] + job[ESCAPE_BYTES] * (from_T[job[TIERS]] + before)
    if value_bits % 8:
        at = n * (value_bits // 8) + from_T[0] // 8
        _read_stripes(data, at, stop - from_T[0], (n + 7) >> 3, value_bits % 8, left_N)
    place_N, left_N = place_N[skip_T[0] :], left_N[skip_T[0] :]
    out_N[:] = 0
    _place_escapes(job, data, escapes_at, place_N, out_N)
    _add_contexts(job, data[first:], n, left_N, place_N[: stop - first])
    exponents = array_at(job[EXPONENTS], 256, np.uint8)
    look_up(exponents, place_N, stop - first, job[SIMD] != 0)
    if value_bits == 8:
        _place_bytes(data[first:stop], place_N, job[place.MANTISSA], out_N)
    else:
        _place_values(job, data[first:], n, place_N, left_N, out_N)


@_njit
def _read_tiers(job, data, reached_T, part, code_N, further_N):
    """Read the places of exponents in their lists, the last tier first.

    Returns:
        The array of them, and the other one.
    """
    starts_T, from_T, to_T, skip_T = part
    last = job[TIERS] - 1
    for t in range(last, -1, -1):
        stripe, width = (np.int64(reached_T[t]) + 7) >> 3, width_of(job, t)
        n = to_T[t] - from_T[t]
        _read_stripes(data, starts_T[t] + from_T[t] // 8, n, stripe, width, code_N)
        if t < last:
            most = np.uint8((1 << width) - 1)
            add_past(code_N, n, most, further_N[skip_T[t + 1] :], job[SIMD] != 0)
        code_N, further_N = further_N, code_N
    return further_N, code_N


@_njit
def _read_stripes(data, at, n, stripe, width, code_N):
    """Read `width` stripes of `stripe` bytes each to the low bits of n codes."""
    for start in range(0, n, LANES):
        set_stripe(code_N, start, load_word(data, at + start // 8))
    for bit in range(1, width):
        at += stripe
        for start in range(0, n, LANES):
            add_stripe(code_N, start, load_word(data, at + start // 8), bit)
    code_N[n : n + LANES] = 0


@_njit
def _place_escapes(job, data, at, code_N, out_N):
    """Put exponent and dropped bits of the weights that escape in their places.

    Args:
        job: The job.
        data: The record.
        at: Where the first escape is in it.
        code_N: uint8, places in lists.
        out_N: Zeros, written where weights escape.
    """
    number, escape = out_N.dtype.type, np.uint8(job[ESCAPE])
    dropped = np.uint64(job[place.DROPPED])
    lost_mask, shift = (np.uint64(1) << dropped) - np.uint64(1), np.uint64(job[place.MANTISSA])
    for start in range(0, out_N.size, STRETCH):
        stop = min(start + STRETCH, out_N.size)
        if not count_ties(code_N[start:stop], _EVERYTHING, escape):
            continue
        for j in range(start, stop):
            if code_N[j] == escape:
                item = np.uint64(0)
                for byte in range(job[ESCAPE_BYTES]):
                    item |= np.uint64(data[at]) << np.uint64(8 * byte)
                    at += 1
                out_N[j] = number(((item >> dropped) << shift) | (item & lost_mask))


@_njit
def _add_contexts(job, data, n, left_N, place_N):
    """Add LIST_ROOM times the context to each place.

    Args:
        job: The job.
        data: The record, from the lowest byte of the first weight's value on.
        n: Weights of the record.
        left_N: uint8, the bits of values past whole bytes.
        place_N: uint8, changed.
    """
    value_bits, context = job[VALUE_BITS], job[CONTEXT_BITS]
    for bit in range(context):
        at = value_bits - 1 - context + bit
        byte, mask = at // 8, np.uint8(1 << (at % 8))
        if byte < value_bits // 8:
            _add_where(data[byte * n :], mask, np.uint8(LIST_ROOM << bit), place_N)
        else:
            _add_where(left_N, mask, np.uint8(LIST_ROOM << bit), place_N)


@_njit
def _add_where(byte_N, mask, what, place_N):
    """Set the bits of `what` where a byte has the bit of `mask`."""
    for j in range(place_N.size):
        place_N[j] |= what if byte_N[j] & mask else np.uint8(0)


@_njit
def _place_bytes(value_N, exponent_N, mantissa, out_N):
    """Put a sign and seven bits of mantissa, a byte in all, around each exponent."""
    number = out_N.dtype.type
    width = np.uint64(8 * out_N.itemsize - 1)
    shift, top = np.uint64(mantissa) & width, np.uint64(8 * out_N.itemsize - 8)
    low = np.uint64(mantissa - 7) & width
    for j in range(out_N.size):
        value = number(value_N[j])
        sign = number((value & number(128)) << top)
        kept = number((value & number(127)) << low)
        out_N[j] |= number(sign | kept | number(number(exponent_N[j]) << shift))


@_njit
def _place_values(job, data, n, exponent_N, left_N, out_N):
    """Put values of any number of bits around each exponent.

    Args:
        job: The job.
        data: The record, from the lowest byte of the first weight's value on.
        n: Weights of the record.
        exponent_N: uint8, their exponents.
        left_N: uint8, the bits of values past whole bytes.
        out_N: Zeros, or exponent and dropped bits of weights that escape; written.
    """
    value_bits, dropped = job[VALUE_BITS], job[place.DROPPED]
    number = out_N.dtype.type
    whole, left = value_bits // 8, value_bits % 8
    shift = np.uint64(job[place.MANTISSA]) & np.uint64(8 * out_N.itemsize - 1)
    for j in range(out_N.size):
        out_N[j] |= number(number(exponent_N[j]) << shift)
    for i in range(whole):
        bits = 7 if 8 * (i + 1) == value_bits else 8
        _add_bits(data[i * n :], bits, dropped + 8 * i, out_N)
    if left:
        _add_bits(left_N, left - 1, dropped + 8 * whole, out_N)


@_njit
def _add_bits(byte_N, bits, shift, out_N):
    """Put the low bits of each byte in their place; if fewer than 8, the bit above is the sign."""
    number = out_N.dtype.type
    width = np.uint64(8 * out_N.itemsize - 1)
    low = np.uint64(shift) & width
    mask = np.uint8((1 << bits) - 1)
    rest, top = np.uint64(bits) & np.uint64(7), np.uint64(width)
    sign_mask = number(0 if bits == 8 else 1)
    for j in range(out_N.size):
        sign = number((number(byte_N[j] >> rest) & sign_mask) << top)
        out_N[j] = number(out_N[j] | sign | number(number(byte_N[j] & mask) << low))
