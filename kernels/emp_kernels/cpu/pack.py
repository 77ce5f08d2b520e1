"""Rows of weights to packed records: select, mask, window, values, codes, escapes, in one pass.

Legend: w_RC are bit patterns, R rows of C weights; kept_K the patterns that one row keeps;
table_R3 holds, of each row, the weights kept, how many escape, and the base of its window;
stats_R3 its Σs, Σs² and Σ_kept s.
"""

import numba
import numpy as np

from emp_kernels.cpu.select import (
    CHUNK,
    compress_row,
    count_reaching,
    count_ties,
    kth_key,
    largest_key,
    row_sums,
    tie_columns,
)

__all__ = [
    "DONE",
    "DOUBTFUL",
    "MAX_BINADES",
    "NOTHING",
    "NOT_FINITE",
    "RECORDS",
    "ROWS",
    "SCRATCH_SLACK",
    "best_base",
    "binades",
    "count_from_sums",
    "kept_sum",
    "pack_block",
    "smallest_key",
    "write_record",
]

_njit = numba.njit(nogil=True, cache=True)

NOTHING, RECORDS, ROWS = 0, 1, 2
"""What is written of a block besides its table and stats."""

DONE, NOT_FINITE, DOUBTFUL = 0, 1, 2
"""How a block ended: all rows packed; a row with NaN or Inf; a count that float64 cannot decide."""

SCRATCH_SLACK = 64
"""Bytes past the end of buffers that vector stores may touch."""

_STRETCH = 128
"""Escapes are few: stretches of this many weights without one are passed over."""

MAX_BINADES = 256
"""A format of 32 bits or fewer has at most this many exponents."""


@_njit
def count_from_sums(s1, s2, n, beta_slack):
    """`emp_kernels.counting.trusted_count`, with −1 for None."""
    if s2 == 0.0:
        return 0
    estimate = beta_slack * (s1 * s1 / s2)
    if estimate >= 2.0 * n:
        return n
    doubt = estimate * ((3 * n + 16) * 2.0**-53)
    low = np.int64(min(estimate - doubt, np.float64(n)))
    high = np.int64(min(estimate + doubt, np.float64(n)))
    if low != high:
        return -1
    return min(n, max(1, low))


@_njit
def smallest_key(kept_K, key_mask):
    """The smallest key of kept weights."""
    smallest = key_mask
    for j in range(kept_K.size):
        smallest = min(smallest, kept_K.dtype.type(kept_K[j] & key_mask))
    return np.int64(smallest)


@_njit
def binades(kept_K, k, key_mask, dropped, smallest, stored, counts):
    """Count kept weights by binade above the smallest: counts[b] keys in [m + b·2**s, ...)."""
    counts[:] = 0
    for j in range(k):
        key = np.int64(kept_K[j] & key_mask) >> dropped
        counts[(key - smallest) >> stored] += 1


@_njit
def best_base(counts, radix):
    """The first of `radix` binades together that hold most, and how many they hold."""
    inside = np.int64(0)
    for b in range(min(radix, MAX_BINADES)):
        inside += counts[b]
    best, most = 0, inside
    for b in range(1, MAX_BINADES - radix + 1):
        inside += counts[b + radix - 1] - counts[b - 1]
        if inside > most:
            best, most = b, inside
    return best, most


@_njit
def distances(kept_K, k, key_mask, dropped, base, limit, delta_K):
    """Distance of each kept key from the window's base, `limit` where it escapes; their number."""
    number = kept_K.dtype.type
    shift = np.uint64(dropped) & np.uint64(8 * kept_K.itemsize - 1)
    base_key, furthest = number(base), number(limit)
    lost = number((1 << dropped) - 1)
    escaped = 0
    for start in range(0, k, CHUNK):
        stop = min(start + CHUNK, k)
        escaped += _distances_chunk(
            kept_K[start:stop], key_mask, lost, shift, base_key, furthest, delta_K[start:stop]
        )
    return escaped


@_njit
def _distances_chunk(kept_K, key_mask, lost, shift, base, limit, delta_K):
    number = kept_K.dtype.type
    escaped = np.uint16(0)
    for j in range(kept_K.size):
        key = kept_K[j] & key_mask
        away = number(number(key >> shift) - base)
        clipped = limit if key & lost else min(away, limit)
        delta_K[j] = clipped
        escaped = np.uint16(escaped + np.uint16(clipped == limit))
    return np.int64(escaped)


@_njit
def kept_sum(kept_K, k, key_mask, shift, scale):
    """Sum of the kept magnitudes, float64."""
    return row_sums(kept_K[:k], key_mask, shift, scale)[0]


@_njit
def write_row(w_C, key_mask, threshold, tie_end, dense_C):
    """The row with zeros for the weights that go; dense_C may be w_C."""
    number = w_C.dtype.type
    early, late = number(threshold), number(threshold + 1)
    _clear_below(w_C[:tie_end], key_mask, early, dense_C[:tie_end])
    _clear_below(w_C[tie_end:], key_mask, late, dense_C[tie_end:])


@_njit
def _clear_below(w_C, key_mask, needed, dense_C):
    for c in range(w_C.size):
        keeps = (w_C[c] & key_mask) >= needed
        dense_C[c] = w_C[c] if keeps else w_C.dtype.type(0)


@_njit
def write_values(kept_K, delta_K, k, sign_shift, stored, out, at):
    """Sign and low bits of each kept weight, 1 + stored bits apiece, first weight lowest."""
    if stored == 7:
        _write_bytes(kept_K[:k], delta_K[:k], np.uint64(8 * kept_K.itemsize - 8), out[at : at + k])
        return
    low_mask = np.uint64((1 << stored) - 1)
    width = np.uint64(stored + 1)
    pending, filled = np.uint64(0), np.uint64(0)
    for j in range(k):
        sign = np.uint64(kept_K[j]) >> np.uint64(sign_shift)
        value = (sign << np.uint64(stored)) | (np.uint64(delta_K[j]) & low_mask)
        pending |= value << filled
        filled += width
        while filled >= 8:
            out[at] = np.uint8(pending & np.uint64(255))
            pending >>= np.uint64(8)
            at += 1
            filled -= np.uint64(8)
    if filled:
        out[at] = np.uint8(pending)


@_njit
def _write_bytes(kept_K, delta_K, top_byte, out_K):
    number = kept_K.dtype.type
    for j in range(kept_K.size):
        sign = number(kept_K[j] >> top_byte) & number(128)
        out_K[j] = np.uint8(sign | (delta_K[j] & number(127)))


@_njit
def write_codes(delta_K, k, stored, radix, digits, code_K, out, at):
    """Binade of each kept weight: byte i holds digits of weights i, i + m, i + 2m, ..."""
    number = delta_K.dtype.type
    shift = np.uint64(stored) & np.uint64(8 * delta_K.itemsize - 1)
    for j in range(k):
        code_K[j] = np.uint8(number(delta_K[j] >> shift))
    length = (k + digits - 1) // digits
    out_M = out[at : at + length]
    out_M[:] = code_K[:length]
    weight = np.uint8(radix)
    for digit in range(1, digits):
        first = digit * length
        _add_digits(code_K[first : min(first + length, k)], weight, out_M)
        weight = np.uint8(weight * radix)


@_njit
def _add_digits(code_M, weight, out_M):
    for i in range(code_M.size):
        out_M[i] = np.uint8(out_M[i] + np.uint8(code_M[i] * weight))


@_njit
def write_escapes(kept_K, delta_K, k, limit, out, at):
    """The whole weights that escape, in order, little-endian; returns where they end."""
    marker = delta_K.dtype.type(limit)
    everything = ~delta_K.dtype.type(0)
    for start in range(0, k, _STRETCH):
        stop = min(start + _STRETCH, k)
        if not count_ties(delta_K[start:stop], everything, marker):
            continue
        for j in range(start, stop):
            if delta_K[j] == marker:
                bits = np.uint64(kept_K[j])
                for _ in range(kept_K.itemsize):
                    out[at] = np.uint8(bits & np.uint64(255))
                    bits >>= np.uint64(8)
                    at += 1
    return at


@_njit
def padded(out, end, align):
    """Write zeros from `end` to the next multiple of align; returns that."""
    stop = (end + align - 1) // align * align
    for i in range(end, stop):
        out[i] = 0
    return stop


@_njit
def write_record(
    kept_K, k, columns, smallest, key_mask, bits, layout, emit, out, at, counts, delta_K, code_K
):
    """Choose a row's window, and with RECORDS write what follows its mask at out[at:].

    Returns:
        (how many weights escape, base of the window, where the record ends).
    """
    dropped, stored, radix, digits, limit, align = layout
    base = smallest >> dropped
    escaped = distances(kept_K, k, key_mask, dropped, base, limit, delta_K)
    if escaped * 64 > k:
        binades(kept_K, k, key_mask, dropped, base, stored, counts)
        base += best_base(counts, radix)[0] << stored
        escaped = distances(kept_K, k, key_mask, dropped, base, limit, delta_K)
    if emit != RECORDS:
        return escaped, base, at
    if k < columns:
        at = padded(out, at + (columns + 7) // 8, align)
    write_values(kept_K, delta_K, k, bits - 1, stored, out, at)
    at = padded(out, at + (k * (stored + 1) + 7) // 8, align)
    if digits:
        write_codes(delta_K, k, stored, radix, digits, code_K, out, at)
        at = padded(out, at + (k + digits - 1) // digits, align)
    if escaped:
        end = write_escapes(kept_K, delta_K, k, limit, out, at)
        at = padded(out, end, align)
    return escaped, base, at


@_njit
def pack_block(
    w_RC,
    number_format,
    layout,
    rule,
    start,
    simd,
    emit,
    out,
    dense_RC,
    table_R3,
    stats_R3,
    kept_K,
    delta_K,
    code_K,
):
    """Select in and pack all rows of a block.

    Args:
        w_RC: uint16 or uint32 [R, C], contiguous.
        number_format: (key mask as w_RC's dtype, key of infinity, bits, float32 shift, scale).
        layout: (dropped bits, stored bits, radix, digits, limit, align).
        rule: (beta · slack, threshold, ties): with threshold < 0 each row is a group of its own,
            else keys above the threshold are kept, and the first `ties` equal to it.
        start: (row to begin with, bytes already written, count to use for that row instead of
            float64's, or −1).
        simd: Whether to use vector compression.
        emit: NOTHING but table and stats, RECORDS to out, or dense ROWS to dense_RC.
        out: uint8, room for R longest records and SCRATCH_SLACK.
        dense_RC: of w_RC's dtype, [R, C], may be w_RC itself.
        table_R3: int64 [R, 3], written.
        stats_R3: float64 [R, 3], written.
        kept_K: scratch of w_RC's dtype, C + SCRATCH_SLACK.
        delta_K: the same.
        code_K: scratch, uint8, C.

    Returns:
        (status, row it refers to, bytes written). After DOUBTFUL, call again from that row.
    """
    key_mask, infinity, bits, shift, scale = number_format
    beta_slack, fixed_threshold, ties_left = rule
    rows, columns = w_RC.shape
    mask_bytes = (columns + 7) // 8
    mask = np.empty(mask_bytes + SCRATCH_SLACK, np.uint8)
    counts = np.empty(MAX_BINADES, np.int64)
    guess = np.int64(0)
    first, at, forced = start
    for r in range(first, rows):
        w_C = w_RC[r]
        largest = largest_key(w_C, key_mask)
        if largest >= infinity:
            return NOT_FINITE, r, at
        s1, s2 = row_sums(w_C, key_mask, np.uint64(shift), scale)
        if fixed_threshold < 0:
            k = forced if r == first else np.int64(-1)
            if k < 0:
                k = count_from_sums(s1, s2, columns, beta_slack)
                if k < 0:
                    return DOUBTFUL, r, at
            threshold, reach, exceed = np.int64(largest) + 1, np.int64(0), np.int64(0)
            if k > 0:
                threshold, reach, exceed = kth_key(w_C, key_mask, k, largest, guess)
                guess = threshold
            ties = k - exceed
        else:
            threshold = np.int64(fixed_threshold)
            reach = count_reaching(w_C, key_mask, threshold)
            exceed = count_reaching(w_C, key_mask, threshold + 1)
            ties = min(reach - exceed, ties_left)
            ties_left -= ties
            k = exceed + ties
        stats_R3[r, 0] = s1
        stats_R3[r, 1] = s2
        if k == 0:
            stats_R3[r, 2] = 0.0
            table_R3[r, 0] = 0
            table_R3[r, 1] = 0
            table_R3[r, 2] = 0
            if emit == ROWS:
                dense_RC[r] = 0
            continue
        tie_end = columns
        if ties < reach - exceed:
            tie_end = tie_columns(w_C, key_mask, threshold, ties)
        if emit == RECORDS:
            compress_row(w_C, key_mask, threshold, tie_end, kept_K, out, at, simd)
        else:
            compress_row(w_C, key_mask, threshold, tie_end, kept_K, mask, 0, simd)
        stats_R3[r, 2] = kept_sum(kept_K, k, key_mask, np.uint64(shift), scale)
        if emit == ROWS:
            write_row(w_C, key_mask, threshold, tie_end, dense_RC[r])
            table_R3[r, 0] = k
            table_R3[r, 1] = 0
            table_R3[r, 2] = 0
            continue
        smallest = threshold if fixed_threshold < 0 else smallest_key(kept_K[:k], key_mask)
        escaped, base, at = write_record(
            kept_K,
            k,
            columns,
            smallest,
            key_mask,
            bits,
            layout,
            emit,
            out,
            at,
            counts,
            delta_K,
            code_K,
        )
        table_R3[r, 0] = k
        table_R3[r, 1] = escaped
        table_R3[r, 2] = base
    return DONE, rows, at
