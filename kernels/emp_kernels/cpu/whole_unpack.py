"""Unpacks whole records to weights; all that a record says is checked on the way.

Legend as in `emp_kernels.cpu.whole_pack`. starts_T and reached_T say of each tier where its stripes
start and how many weights get to it; their last items say the same of the escapes.
"""

import numba
import numpy as np

from emp_kernels.cpu.bit_steps import (
    LANES,
    add_past,
    add_stripe,
    count_bits,
    load_word,
    look_up,
    set_stripe,
)
from emp_kernels.cpu.select import STRETCH, count_ties
from emp_kernels.cpu.status import BAD_ESCAPES, BAD_LENGTH, BAD_STRIPE, DONE
from emp_kernels.cpu.whole_pack import LIST_ROOM

__all__ = ["unpack_records"]

_njit = numba.njit(nogil=True, cache=True)


@_njit
def _last_word(data, at, n):
    """The bits of a stripe of n behind its last whole word, as a word; reads no byte behind it."""
    word = np.uint64(0)
    for i in range(((n % LANES) + 7) >> 3):
        word |= np.uint64(data[at + (n // LANES * 8) + i]) << np.uint64(8 * i)
    return word


@_njit
def _end_clean(data, at, n, stripes):
    """Whether none of some stripes, of n bits each, has a bit set past its last weight."""
    if n & 7 == 0:
        return True
    for _ in range(stripes):
        if data[at + (n >> 3)] >> np.uint8(n & 7) != 0:
            return False
        at += (n + 7) >> 3
    return True


@_njit
def _count_past(data, at, n, width):
    """How many codes of a tier have all bits set."""
    stripe = (n + 7) >> 3
    past = np.int64(0)
    for i in range(at, at + n // LANES * 8, 8):
        word = load_word(data, i)
        for bit in range(1, width):
            word &= load_word(data, i + bit * stripe)
        past += count_bits(word)
    last = _last_word(data, at, n)
    for bit in range(1, width):
        last &= _last_word(data, at + bit * stripe, n)
    return past + count_bits(last)


@_njit
def _find_tiers(data, at, n, widths, escape_bytes, starts_T, reached_T):
    """Find where tiers and escapes start: each tier says how many weights get to the next.

    Returns:
        DONE, or how the record contradicts its length.
    """
    for t in range(widths.size):
        width, stripe = widths[t], (n + 7) >> 3
        starts_T[t], reached_T[t] = at, n
        if at + width * stripe > data.size:
            return BAD_LENGTH
        if not _end_clean(data, at, n, width):
            return BAD_STRIPE
        n = _count_past(data, at, n, width)
        at += width * stripe
    starts_T[widths.size], reached_T[widths.size] = at, n
    return DONE if at + n * escape_bytes == data.size else BAD_LENGTH


@_njit
def _read_stripes(data, at, n, width, code_N):
    """Read stripes to the low bits of n codes."""
    stripe = (n + 7) >> 3
    whole = n // LANES * LANES
    for start in range(0, whole, LANES):
        set_stripe(code_N, start, load_word(data, at + (start >> 3)))
    set_stripe(code_N, whole, _last_word(data, at, n))
    for bit in range(1, width):
        at += stripe
        for start in range(0, whole, LANES):
            add_stripe(code_N, start, load_word(data, at + (start >> 3)), bit)
        add_stripe(code_N, whole, _last_word(data, at, n), bit)
    code_N[n : n + LANES] = 0


@_njit
def _read_tiers(data, widths, starts_T, reached_T, simd, code_N, further_N):
    """Read the places of exponents in their lists, the last tier first.

    Returns:
        The array of them, and the other one.
    """
    last = widths.size - 1
    for t in range(last, -1, -1):
        n, width = reached_T[t], widths[t]
        _read_stripes(data, starts_T[t], n, width, code_N)
        if t < last:
            add_past(code_N, n, np.uint8((1 << width) - 1), further_N, simd)
        code_N, further_N = further_N, code_N
    return further_N, code_N


@_njit
def _add_contexts(data, format_, left_N, place_N):
    """Add LIST_ROOM times the context to each place; left_N are the bits past whole bytes."""
    _, _, _, value_bits, context = format_
    n = place_N.size
    for bit in range(context):
        at = value_bits - 1 - context + bit
        byte, mask = at // 8, np.uint8(1 << (at % 8))
        if byte < value_bits // 8:
            _add_where(data[byte * n : (byte + 1) * n], mask, np.uint8(LIST_ROOM << bit), place_N)
        else:
            _add_where(left_N[:n], mask, np.uint8(LIST_ROOM << bit), place_N)


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
        out_N[j] = number(sign | kept | number(number(exponent_N[j]) << shift))


@_njit
def _place_values(data, exponent_N, format_, left_N, out_N):
    """Put values of any number of bits around each exponent; left_N are those past whole bytes."""
    mantissa, _, dropped, value_bits, _ = format_
    number = out_N.dtype.type
    n, whole, left = out_N.size, value_bits // 8, value_bits % 8
    shift = np.uint64(mantissa) & np.uint64(8 * out_N.itemsize - 1)
    for j in range(n):
        out_N[j] = number(number(exponent_N[j]) << shift)
    for i in range(whole):
        bits = 7 if 8 * (i + 1) == value_bits else 8
        _add_bits(data[i * n : (i + 1) * n], bits, dropped + 8 * i, out_N)
    if left:
        _add_bits(left_N[:n], left - 1, dropped + 8 * whole, out_N)


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


@_njit
def _find_escapes(code_N, n, escape, escape_E):
    """Find the weights that escape."""
    found = 0
    everything = np.uint8(255)
    for start in range(0, n, STRETCH):
        stop = min(start + STRETCH, n)
        if not count_ties(code_N[start:stop], everything, escape):
            continue
        for j in range(start, stop):
            if code_N[j] == escape:
                escape_E[found] = j
                found += 1


@_njit
def _place_escapes(data, at, format_, escape_bytes, numbers, escape, escape_E, out_N):
    """Put exponent and dropped bits of the weights that escape in their places.

    Returns whether all of them had to escape, and have an exponent that the format can hold.
    """
    mantissa, exponent_mask, dropped, _, _ = format_
    number = out_N.dtype.type
    lost_mask = np.uint64((1 << dropped) - 1)
    for i in range(escape_E.size):
        item = np.uint64(0)
        for byte in range(escape_bytes):
            item |= np.uint64(data[at]) << np.uint64(8 * byte)
            at += 1
        exponent, lost = item >> np.uint64(dropped), item & lost_mask
        if exponent > np.uint64(exponent_mask):
            return False
        if lost == 0 and numbers[exponent] != escape:
            return False
        j = escape_E[i]
        bits = np.uint64(out_N[j]) | (exponent << np.uint64(mantissa)) | lost
        out_N[j] = number(bits)
    return True


@_njit
def unpack_records(
    payload,
    lengths,
    per_record,
    format_,
    widths,
    numbers,
    exponents,
    escape,
    escape_bytes,
    simd,
    out_N,
    code_N,
    further_N,
    escapes,
):
    """Decode records.

    Args:
        payload: uint8, the records, one after the other.
        lengths: int64 [records], the length of each: payload holds their sum.
        per_record: as for `emp_kernels.cpu.whole_pack.pack_records`.
        format_: the same.
        widths: the same.
        numbers: the same.
        exponents: uint8 [256], by context and place, the exponents of the lists; zeros elsewhere.
        escape: as for `emp_kernels.cpu.whole_pack.pack_records`.
        escape_bytes: the same.
        simd: the same.
        out_N: uint16 or uint32 [N], contiguous, written.
        code_N: scratch, uint8 [per_record + LANES].
        further_N: the same.
        escapes: scratch, int64 [per_record].

    Returns:
        (status, record it refers to): DONE, or how a record contradicts its length or itself.
    """
    _, _, _, value_bits, _ = format_
    tiers = widths.size
    starts, reached = np.empty(tiers + 1, np.int64), np.empty(tiers + 1, np.int64)
    at = 0
    for record in range(lengths.size):
        data = payload[at : at + lengths[record]]
        at += lengths[record]
        here_N = out_N[record * per_record : min((record + 1) * per_record, out_N.size)]
        n = here_N.size
        stripes_at, stripes = n * (value_bits // 8), value_bits % 8
        tiers_at = stripes_at + stripes * ((n + 7) >> 3)
        if tiers_at > data.size:
            return BAD_LENGTH, record
        if not _end_clean(data, stripes_at, n, stripes):
            return BAD_STRIPE, record
        status = _find_tiers(data, tiers_at, n, widths, escape_bytes, starts, reached)
        if status != DONE:
            return status, record
        place_N, left_N = _read_tiers(data, widths, starts, reached, simd, code_N, further_N)
        escape_E = escapes[: reached[tiers]]
        if escape_E.size:
            _find_escapes(place_N, n, escape, escape_E)
        if stripes:
            _read_stripes(data, stripes_at, n, stripes, left_N)
        _add_contexts(data, format_, left_N, place_N[:n])
        look_up(exponents, place_N, n, simd)
        if value_bits == 8:
            _place_bytes(data[:n], place_N, format_[0], here_N)
        else:
            _place_values(data, place_N, format_, left_N, here_N)
        if not _place_escapes(
            data, starts[tiers], format_, escape_bytes, numbers, escape, escape_E, here_N
        ):
            return BAD_ESCAPES, record
    return DONE, lengths.size
