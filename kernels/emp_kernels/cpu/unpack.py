"""Unpacks records to rows of weights; all that a record says is checked on the way.

A record comes from a file that may be damaged, so no count in it is trusted: the row table's counts
are within bounds (see `emp_kernels.checks`), and here mask and values must agree with them.

Legend as in `emp_kernels.cpu.pack`: kept_K are the patterns of a row's kept weights, delta_K their
distances from the base of the window, out_RC the rows that they fill.
"""

import numba
import numpy as np

from emp_kernels.cpu.select import STRETCH, count_ties
from emp_kernels.cpu.simd import VECTOR_BYTES, expand_step
from emp_kernels.cpu.status import BAD_ESCAPES, BAD_MASK, DONE, NOT_FINITE

__all__ = ["check_mask", "decode_row", "expand_row", "spread_row", "unpack_block"]

_njit = numba.njit(nogil=True, cache=True)


@_njit
def _read_codes(codes_M, k, radix, digits, code_K):
    """Read the codes: the base-`radix` digits of byte i belong to weights i, i + m, i + 2m, ..."""
    length = codes_M.size
    reciprocal = np.uint32((65536 + radix - 1) // radix)
    weight = np.uint32(radix)
    rest_M = codes_M.astype(np.uint32)
    for digit in range(digits):
        first = digit * length
        _next_digit(rest_M[: max(min(length, k - first), 0)], reciprocal, weight, code_K[first:])


@_njit
def _next_digit(rest_M, reciprocal, weight, code_M):
    """Split off the lowest digit of each rest.

    rest // radix is a multiplication and a shift, for CPUs have no vector division: with
    ⌈2**16 / radix⌉ for the reciprocal it is exact for all rests below 4,096.
    """
    for i in range(rest_M.size):
        quotient = np.uint32((rest_M[i] * reciprocal) >> np.uint32(16))
        code_M[i] = np.uint8(rest_M[i] - np.uint32(quotient * weight))
        rest_M[i] = quotient


@_njit
def _read_values(payload, at, k, stored, sign_shift, kept_K, delta_K):
    """Read signs, at their place in a weight, to kept_K and the stored low bits to delta_K."""
    if stored == 7:
        _read_bytes(payload[at : at + k], np.uint64(8 * kept_K.itemsize - 8), kept_K, delta_K)
        return
    low_mask = np.uint64((1 << stored) - 1)
    width = stored + 1
    pending, filled = np.uint64(0), 0
    for j in range(k):
        while filled < width:
            pending |= np.uint64(payload[at]) << np.uint64(filled)
            at += 1
            filled += 8
        delta_K[j] = pending & low_mask
        kept_K[j] = ((pending >> np.uint64(stored)) & np.uint64(1)) << np.uint64(sign_shift)
        pending >>= np.uint64(width)
        filled -= width


@_njit
def _read_bytes(value_K, top_byte, kept_K, delta_K):
    number = kept_K.dtype.type
    for j in range(value_K.size):
        kept_K[j] = number(number(value_K[j] & np.uint8(128)) << top_byte)
        delta_K[j] = number(value_K[j] & np.uint8(127))


@_njit
def _add_codes(code_K, k, stored, delta_K):
    """Add each weight's binade to delta_K, above the low bits."""
    number = delta_K.dtype.type
    shift = np.uint64(stored) & np.uint64(8 * delta_K.itemsize - 1)
    for j in range(k):
        delta_K[j] = number(delta_K[j] + number(number(code_K[j]) << shift))


@_njit
def _place(kept_K, delta_K, k, base, dropped, limit, largest):
    """Put keys, base plus distance, below the signs in kept_K: whole weights, but for escapes.

    Returns whether all keys but those of escapes are at most `largest`: beyond it, bits would be
    lost by the shift, and an infinite weight could look finite.
    """
    number = kept_K.dtype.type
    shift = np.uint64(dropped) & np.uint64(8 * kept_K.itemsize - 1)
    start, marker, last = number(base), number(limit), number(largest)
    past = np.uint16(0)
    for j in range(k):
        key = number(delta_K[j] + start)
        past |= np.uint16((key > last) & (delta_K[j] != marker))
        kept_K[j] = number(kept_K[j] | number(key << shift))
    return past == 0


@_njit
def _fill_escapes(payload, at, escaped, delta_K, k, limit, kept_K):
    """Put the escaped weights in their places; returns whether `escaped` of them are marked."""
    marker = delta_K.dtype.type(limit)
    everything = ~delta_K.dtype.type(0)
    found = 0
    for start in range(0, k, STRETCH):
        stop = min(start + STRETCH, k)
        if not count_ties(delta_K[start:stop], everything, marker):
            continue
        for j in range(start, stop):
            if delta_K[j] == marker:
                if found == escaped:
                    return False
                bits = np.uint64(0)
                for i in range(kept_K.itemsize):
                    bits |= np.uint64(payload[at + i]) << np.uint64(8 * i)
                kept_K[j] = bits
                at += kept_K.itemsize
                found += 1
    return found == escaped


@_njit
def _all_finite(kept_K, key_mask, infinity):
    """Whether no pattern is NaN or infinite."""
    bad = np.uint16(0)
    for j in range(kept_K.size):
        bad |= np.uint16((kept_K[j] & key_mask) >= infinity)
    return bad == 0


@_njit
def _names_only(mask, mask_at, columns, k):
    """Whether a mask names k columns, and none past the last."""
    if columns & 7 and mask[mask_at + (columns >> 3)] >> (columns & 7):
        return False
    named = 0
    for i in range((columns + 7) >> 3):  # bits set: of two, of four, of eight, and LLVM vectorizes
        byte = np.int64(mask[mask_at + i])
        byte -= (byte >> 1) & 0x55
        byte = (byte & 0x33) + ((byte >> 2) & 0x33)
        named += (byte + (byte >> 4)) & 15
    return named == k


@_njit
def expand_row(kept_K, mask, mask_at, out_C, simd):
    """Spread kept weights over a row by its mask, at mask[mask_at:], and +0.0 elsewhere.

    kept_K is read one item past the last kept weight.
    """
    columns = out_C.size
    lanes = VECTOR_BYTES // out_C.itemsize
    start = columns // lanes * lanes if simd else 0
    at = np.int64(0)
    for c in range(0, start, lanes):
        at += expand_step(kept_K, at, mask, mask_at + (c >> 3), out_C, c)
    for c in range(start, columns):
        keep = np.int64(mask[mask_at + (c >> 3)] >> np.uint8(c & 7)) & 1
        out_C[c] = kept_K[at] * out_C.dtype.type(
            keep
        )  # no branch: half of all would be mispredicted
        at += keep


@_njit
def decode_row(payload, at, sections, line, number_format, layout, kept_K, delta_K, code_K):
    """Decode the kept weights of the record at payload[at:] to kept_K.

    Args:
        payload: uint8, holds the record.
        at: Where it starts.
        sections: Lengths of its sections, a line of `RowLayout.sections`.
        line: (weights kept ≤ C, escapes ≤ kept, window base).
        number_format: As for `unpack_block`.
        layout: The same.
        kept_K: The same.
        delta_K: The same; distances are left there, those of escapes are the layout's limit.
        code_K: The same.

    Returns:
        DONE, or how the record contradicts its table line or itself. Its mask is not looked at.
    """
    key_mask, infinity, bits, _, _ = number_format
    dropped, stored, radix, digits, limit, _ = layout
    k, escaped, base = line
    at += sections[0]
    _read_values(payload, at, k, stored, bits - 1, kept_K, delta_K)
    at += sections[1]
    if digits:
        length = (k + digits - 1) // digits
        _read_codes(payload[at : at + length], k, radix, digits, code_K)
        _add_codes(code_K, k, stored, delta_K)
    at += sections[2]
    if not _place(kept_K, delta_K, k, base, dropped, limit, np.int64(key_mask) >> dropped):
        return NOT_FINITE
    if not _fill_escapes(payload, at, escaped, delta_K, k, limit, kept_K):
        return BAD_ESCAPES
    if not _all_finite(kept_K[:k], key_mask, kept_K.dtype.type(infinity)):
        return NOT_FINITE
    return DONE


@_njit
def check_mask(payload, at, k, columns):
    """DONE if the mask at payload[at:], where there has to be one, names k of so many columns."""
    if 0 < k < columns and not _names_only(payload, at, columns, k):
        return BAD_MASK
    return DONE


@_njit
def spread_row(kept_K, k, payload, mask_at, out_C, simd):
    """Put the k kept weights of a row in their columns, and +0.0 elsewhere.

    Its mask, where it has one, is at payload[mask_at:]; kept_K is read one item past the last kept
    weight.
    """
    if k == 0:
        out_C[:] = 0
    elif k == out_C.size:
        out_C[:] = kept_K[:k]
    else:
        expand_row(kept_K, payload, mask_at, out_C, simd)


@_njit
def unpack_block(
    payload, sections_R4, table_R3, number_format, layout, simd, out_RC, kept_K, delta_K, code_K
):
    """Decode the records of a row block.

    Args:
        payload: uint8, the rows' records, one after the other.
        sections_R4: int64 [R, 4], `RowLayout.sections` of the table: payload holds their sum.
        table_R3: int64 [R, 3], weights kept ≤ C, escapes ≤ kept, window base.
        number_format: as for `emp_kernels.cpu.pack.pack_block`.
        layout: the same.
        simd: Whether to use vector expansion.
        out_RC: uint16 or uint32 [R, C], contiguous, written.
        kept_K: scratch of out_RC's dtype, C + SCRATCH_SLACK.
        delta_K: the same.
        code_K: scratch, uint8, C.

    Returns:
        (status, row it refers to): DONE, or how a row contradicts its table line or itself.
    """
    rows, columns = out_RC.shape
    at = 0
    for r in range(rows):
        k, escaped, base = table_R3[r]
        ended = decode_row(
            payload,
            at,
            sections_R4[r],
            (k, escaped, base),
            number_format,
            layout,
            kept_K,
            delta_K,
            code_K,
        )
        if ended == DONE:
            ended = check_mask(payload, at, k, columns)
        if ended != DONE:
            return ended, r
        spread_row(kept_K, k, payload, at, out_RC[r], simd)
        at += sections_R4[r].sum()
    return DONE, rows
