"""Packs weights to whole records: every bit of them, exponents by a prefix code.

Legend: w_N are the bit patterns of a record's weights; code_N are the places of their exponents in
the list of their context, less the places that earlier tiers stand for. `format_` is (mantissa
bits, mask of an exponent, dropped bits, bits of a value, bits of a context). A table with an item
for each context and place, or number, has that of context c and place p at c · LIST_ROOM + p.
"""

import numba
import numpy as np

from emp_kernels.cpu.bit_steps import LANES, code_bits, look_up, move_past, store_word
from emp_kernels.cpu.select import STRETCH, count_ties
from emp_kernels.whole_tables import LIST_ROOM

__all__ = ["RECORD_SLACK", "pack_records"]

_njit = numba.njit(nogil=True, cache=True)

RECORD_SLACK = 8
"""Bytes past the end of a record that may be written, since stripes are written in words."""


@_njit
def _find_codes(w_N, format_, numbers, places, escape, simd, code_N):
    """Find the place of each exponent in its list; `escape` where dropped bits are not 0."""
    mantissa, exponent_mask, dropped, _, context = format_
    number = w_N.dtype.type
    n = w_N.size
    shift = np.uint64(mantissa) & np.uint64(8 * w_N.itemsize - 1)
    mask = number(exponent_mask)
    for j in range(n):
        code_N[j] = np.uint8((w_N[j] >> shift) & mask)
    look_up(numbers, code_N, n, simd)
    if context:
        above = np.uint64(mantissa - context) & np.uint64(8 * w_N.itemsize - 1)
        context_mask, room = number((1 << context) - 1), number(LIST_ROOM)
        for j in range(n):
            code_N[j] |= np.uint8(number((w_N[j] >> above) & context_mask) * room)
    look_up(places, code_N, n, simd)
    if dropped:
        lost = number((1 << dropped) - 1)
        for j in range(n):
            code_N[j] = escape if w_N[j] & lost else code_N[j]
    code_N[n : n + LANES] = 0


@_njit
def _write_low_bytes(w_N, shift, out_N):
    """Write one byte of each value, not the one that holds the sign."""
    narrow = np.uint64(shift) & np.uint64(8 * w_N.itemsize - 1)
    for j in range(w_N.size):
        out_N[j] = np.uint8(w_N[j] >> narrow)


@_njit
def _write_top_bytes(w_N, shift, out_N):
    """Write the byte of each value whose highest bit is the sign."""
    number = w_N.dtype.type
    width = np.uint64(8 * w_N.itemsize - 1)
    narrow, top = np.uint64(shift) & width, np.uint64(8 * w_N.itemsize - 8)
    for j in range(w_N.size):
        sign = number(w_N[j] >> top) & number(128)
        out_N[j] = np.uint8(sign | (number(w_N[j] >> narrow) & number(127)))


@_njit
def _write_values(w_N, format_, code_N, out, at):
    """Write signs and stored bits of the mantissas; returns where they end."""
    _, _, dropped, value_bits, _ = format_
    n = w_N.size
    whole, left = value_bits // 8, value_bits % 8
    for i in range(whole):
        if 8 * (i + 1) == value_bits:
            _write_top_bytes(w_N, dropped + 8 * i, out[at : at + n])
        else:
            _write_low_bytes(w_N, dropped + 8 * i, out[at : at + n])
        at += n
    if left == 0:
        return at
    number = w_N.dtype.type
    width = np.uint64(8 * w_N.itemsize - 1)
    low_shift, sign_shift = np.uint64(dropped + 8 * whole) & width, np.uint64(width)
    low_mask, sign_place = number((1 << (left - 1)) - 1), np.uint64(left - 1)
    for j in range(n):
        sign = number(number(w_N[j] >> sign_shift) << sign_place)
        code_N[j] = np.uint8(sign | (number(w_N[j] >> low_shift) & low_mask))
    code_N[n : n + LANES] = 0
    return _write_stripes(code_N, n, left, np.int64(255), out, at)


@_njit
def _write_stripes(code_N, n, width, most, out, at):
    """Write the low bits of all codes, as stripes; all are set in those of `most` or more."""
    for bit in range(width):
        for start in range(0, n, LANES):
            store_word(out, at + (start >> 3), code_bits(code_N, start, bit, most))
        at += (n + 7) >> 3
    return at


@_njit
def _write_tiers(code_N, n, widths, simd, emit, out, at):
    """Write the code of each exponent; returns the number of escapes and where the tiers end."""
    for width in widths:
        most = (np.int64(1) << width) - 1
        if emit:
            at = _write_stripes(code_N, n, width, most, out, at)
        else:
            at += width * ((n + 7) >> 3)
        n = move_past(code_N, n, np.uint8(most), simd)
    return n, at


@_njit
def _write_escapes(w_N, format_, place_N, escape, escape_bytes, out, at):
    """Write exponent and dropped bits of the weights that escape; returns where they end."""
    mantissa, exponent_mask, dropped, _, _ = format_
    lost = np.uint64((1 << dropped) - 1)
    everything = np.uint8(255)
    for start in range(0, w_N.size, STRETCH):
        stop = min(start + STRETCH, w_N.size)
        if not count_ties(place_N[start:stop], everything, escape):
            continue
        for j in range(start, stop):
            if place_N[j] == escape:
                bits = np.uint64(w_N[j])
                exponent = (bits >> np.uint64(mantissa)) & np.uint64(exponent_mask)
                item = (exponent << np.uint64(dropped)) | (bits & lost)
                for _ in range(escape_bytes):
                    out[at] = np.uint8(item & np.uint64(255))
                    item >>= np.uint64(8)
                    at += 1
    return at


@_njit
def pack_records(
    w_N,
    per_record,
    format_,
    widths,
    numbers,
    places,
    escape,
    escape_bytes,
    simd,
    emit,
    out,
    lengths,
    code_N,
    place_N,
):
    """Pack weights to records.

    Args:
        w_N: uint16 or uint32 [N], contiguous.
        per_record: Weights in a record.
        format_: See above.
        widths: int64 [tiers], bits of each.
        numbers: uint8 [256], of each exponent of the lists a number below `escape` of its own,
            `escape` of others.
        places: uint8 [256], by context and such a number, the exponent's place in the list;
            `escape` for `escape`.
        escape: uint8, how many exponents a list has.
        escape_bytes: Bytes of an escape.
        simd: Whether to use instructions that not every CPU has.
        emit: Whether to write records; else only their lengths.
        out: uint8, room for the longest records and RECORD_SLACK.
        lengths: int64 [records], written.
        code_N: scratch, uint8 [per_record + LANES].
        place_N: the same.

    Returns:
        How many bytes were written, or would be.
    """
    _, _, _, value_bits, _ = format_
    at = np.int64(0)
    for record in range(lengths.size):
        here_N = w_N[record * per_record : min((record + 1) * per_record, w_N.size)]
        n, start = here_N.size, at
        if emit:
            at = _write_values(here_N, format_, code_N, out, at)
        else:
            at += n * (value_bits // 8) + (value_bits % 8) * ((n + 7) >> 3)
        _find_codes(here_N, format_, numbers, places, escape, simd, code_N)
        if emit:
            place_N[:n] = code_N[:n]
        escaped, at = _write_tiers(code_N, n, widths, simd, emit, out, at)
        if escaped and emit:
            at = _write_escapes(here_N, format_, place_N, escape, escape_bytes, out, at)
        elif escaped:
            at += escaped * escape_bytes
        lengths[record] = at - start
    return at
