"""Checks whole records in full: whether their parts have the lengths that their codes say.

Nothing is decoded for it: only stripes are counted, and escapes looked at. reached_T says of each
tier how many weights get to it, and in its last item how many escape.
"""

import numba
import numpy as np

from emp_kernels.cpu.bit_steps import LANES, count_bits, load_word
from emp_kernels.cpu.status import BAD_ESCAPES, BAD_LENGTH, BAD_STRIPE, DONE

__all__ = ["check_records", "count_past"]

_njit = numba.njit(nogil=True, cache=True)


@_njit
def _past_word(data, at, stripe, width):
    """Which of 64 codes of a tier have all bits set, as a word."""
    word = load_word(data, at)
    if width > 1:
        word &= load_word(data, at + stripe)
    if width > 2:
        word &= load_word(data, at + 2 * stripe)
    return word


@_njit
def count_past(data, at, stripe, width, start, stop):
    """How many of a tier's codes from `start`, a multiple of 64, to `stop` have all bits set.

    Args:
        data: uint8; up to eight bytes behind the tier's last one are read.
        at: Where the tier is in it.
        stripe: Bytes of a stripe.
        width: Bits of a code, 1 to 3.
        start: The first code.
        stop: The code past the last one.
    """
    past = np.int64(0)
    last = at + stop // LANES * 8
    for i in range(at + start // 8, last, 8):
        past += count_bits(_past_word(data, i, stripe, width))
    left = np.uint64(stop % LANES)
    if left:
        named = (np.uint64(1) << left) - np.uint64(1)
        past += count_bits(_past_word(data, last, stripe, width) & named)
    return past


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
def _check_tiers(data, size, at, widths, escape_bytes, reached_T):
    """Follow the tiers of a record of `size` bytes: each says how many weights get to the next."""
    for t in range(widths.size):
        n, width = np.int64(reached_T[t]), widths[t]
        stripe = (n + 7) >> 3
        if at + width * stripe > size:
            return BAD_LENGTH
        if not _end_clean(data, at, n, width):
            return BAD_STRIPE
        reached_T[t + 1] = count_past(data, at, stripe, width, 0, n)
        at += width * stripe
    return DONE if at + reached_T[widths.size] * escape_bytes == size else BAD_LENGTH


@_njit
def _escapes_needed(data, at, size, format_, escape_bytes, numbers, escape):
    """Whether all escapes had to be, and have exponents that the format can hold."""
    _, exponent_mask, dropped, _, _ = format_
    lost_mask = np.uint64((1 << dropped) - 1)
    while at < size:
        item = np.uint64(0)
        for byte in range(escape_bytes):
            item |= np.uint64(data[at]) << np.uint64(8 * byte)
            at += 1
        exponent = item >> np.uint64(dropped)
        if exponent > np.uint64(exponent_mask):
            return False
        if item & lost_mask == 0 and numbers[exponent] != escape:
            return False
    return True


@_njit
def _check_record(data, size, format_, widths, numbers, escape, escape_bytes, reached_T):
    """Check the record that data starts with; reached_T[0] says how many weights it has."""
    n, value_bits = np.int64(reached_T[0]), format_[3]
    stripes_at, stripes = n * (value_bits // 8), value_bits % 8
    tiers_at = stripes_at + stripes * ((n + 7) >> 3)
    if tiers_at > size:
        return BAD_LENGTH
    if not _end_clean(data, stripes_at, n, stripes):
        return BAD_STRIPE
    status = _check_tiers(data, size, tiers_at, widths, escape_bytes, reached_T)
    if status != DONE:
        return status
    escapes_at = size - reached_T[widths.size] * escape_bytes
    needed = _escapes_needed(data, escapes_at, size, format_, escape_bytes, numbers, escape)
    return DONE if needed else BAD_ESCAPES


@_njit
def check_records(
    payload,
    tail,
    tail_start,
    offsets,
    weights,
    per_record,
    format_,
    widths,
    numbers,
    escape,
    escape_bytes,
    reached_RT,
):
    """Check records.

    Args:
        payload: uint8, the records, one after the other.
        tail: uint8, the payload from `tail_start` on, and zeros.
        tail_start: The records that start here or behind it are read from the tail.
        offsets: int64 [R + 1], where each record starts, and the end.
        weights: How many weights all records have.
        per_record: Weights of a record; the last one has what is left.
        format_: As for `emp_kernels.cpu.whole_pack.pack_records`.
        widths: The same.
        numbers: The same.
        escape: The same.
        escape_bytes: The same.
        reached_RT: int32 [R, tiers + 1], written: how many weights get to each tier, and escape.

    Returns:
        (status, record it refers to): DONE, or how a record contradicts its length or itself.
    """
    for r in range(reached_RT.shape[0]):
        start, size = offsets[r], offsets[r + 1] - offsets[r]
        data = tail[start - tail_start :] if start >= tail_start else payload[start:]
        reached_RT[r, 0] = min(per_record, weights - r * per_record)
        status = _check_record(
            data, size, format_, widths, numbers, escape, escape_bytes, reached_RT[r]
        )
        if status != DONE:
            return status, r
    return DONE, reached_RT.shape[0]
