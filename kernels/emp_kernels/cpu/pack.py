"""Packs rows of weights: which of them stay, then mask, window, values, codes and escapes.

A row is worked on alone, from its weights to its finished record, so that after the first of the
passes over it all read it from the L1 or L2 cache. Loops are written for LLVM to vectorize: no
branch inside, integers no wider than a weight, and sums that fit them for CHUNK weights at a time.

Legend: w_RC are bit patterns, R rows of C weights; kept_K the patterns of the K weights of a row
that stay, side by side; delta_K the distances of their keys from the base of the row's window;
table_R3 holds of each row the weights kept, how many of them escape, and the base of its window;
stats_R3 its Σs, Σs² and Σ_kept s.
"""

import numba
import numpy as np

from emp_kernels.cpu.decide import decide_row
from emp_kernels.cpu.select import (
    CHUNK,
    STRETCH,
    compress_row,
    count_ties,
    largest_key,
    row_sums,
)
from emp_kernels.cpu.status import DONE, DOUBTFUL, NOT_FINITE

__all__ = [
    "MAX_BINADES",
    "NOTHING",
    "RECORDS",
    "ROWS",
    "SCRATCH_SLACK",
    "kept_sum",
    "pack_block",
    "put_three",
    "smallest_key",
    "write_record",
]

_njit = numba.njit(nogil=True, cache=True)

NOTHING, RECORDS, ROWS = 0, 1, 2
"""What is written of a row block besides its table and stats."""

SCRATCH_SLACK = 64
"""Items past the end of buffers that vector stores may touch: a store is a whole vector long,
however few of its lanes are kept."""

MAX_BINADES = 256
"""A format of 32 bits or fewer has at most this many exponents."""


@_njit
def smallest_key(kept_K, key_mask):
    """The smallest key of kept weights."""
    smallest = key_mask
    for j in range(kept_K.size):
        smallest = min(smallest, kept_K.dtype.type(kept_K[j] & key_mask))
    return np.int64(smallest)


@_njit
def _count_binades(kept_K, k, key_mask, dropped, smallest, stored, counts):
    """Count kept weights by binade above the smallest key.

    With m = `smallest` and s = `stored`, counts[b] keys lie in [m + b·2**s, m + (b + 1)·2**s).
    """
    counts[:] = 0
    for j in range(k):
        key = np.int64(kept_K[j] & key_mask) >> dropped
        counts[(key - smallest) >> stored] += 1


@_njit
def _best_base(counts, radix):
    """The first of the `radix` neighbouring binades that together hold most weights.

    Of several such windows the lowest one, as in `emp_kernels.reference.choose_base`.
    """
    inside = np.int64(0)
    for b in range(min(radix, MAX_BINADES)):
        inside += counts[b]
    best, most = 0, inside
    for b in range(1, MAX_BINADES - radix + 1):
        inside += counts[b + radix - 1] - counts[b - 1]
        if inside > most:
            best, most = b, inside
    return best


@_njit
def _distances(kept_K, k, key_mask, dropped, base, limit, delta_K):
    """Distance of each kept key from the window's base, `limit` where it escapes; their number."""
    number = kept_K.dtype.type
    # numba shifts in 64 bits. The mask changes no value, but shows LLVM that the shift is below the
    # width of a weight: so it may narrow the operation to that width, and vectorizes 32 at a time.
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
        away = number(number(key >> shift) - base)  # unsigned: keys below the base wrap to far away
        clipped = limit if key & lost else min(away, limit)
        delta_K[j] = clipped
        escaped = np.uint16(escaped + np.uint16(clipped == limit))
    return np.int64(escaped)


@_njit
def put_three(array_R3, r, first, second, third):
    """Set a row of a table or of stats: numba has no assignment of a tuple to one."""
    array_R3[r, 0] = first
    array_R3[r, 1] = second
    array_R3[r, 2] = third


@_njit
def kept_sum(kept_K, k, key_mask, shift, scale):
    """Sum of the kept magnitudes, float64."""
    return row_sums(kept_K[:k], key_mask, shift, scale)[0]


@_njit
def _write_row(w_C, key_mask, threshold, tie_end, dense_C):
    """Write the row with +0.0 in place of the weights that go; dense_C may be w_C."""
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
def _write_values(kept_K, delta_K, k, sign_shift, stored, out, at):
    """Write sign and low bits of each kept weight, 1 + stored bits apiece, first weight lowest."""
    if stored == 7:  # bf16 with all of its mantissa: a value is a byte, and the loop vectorizes
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
def _write_codes(delta_K, k, stored, radix, digits, code_K, out, at):
    """Write the binade of each kept weight: byte i holds digits of weights i, i + m, i + 2m, ...

    The stride of m, the section's length, makes each digit of all bytes a run of neighbouring
    weights: so a digit is one vectorized loop. Neighbours in one byte would need shuffles.
    """
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
def _write_escapes(kept_K, delta_K, k, limit, out, at):
    """Write the whole weights that escape, in order, little-endian; returns where they end."""
    marker = delta_K.dtype.type(limit)
    everything = ~delta_K.dtype.type(0)
    for start in range(0, k, STRETCH):
        stop = min(start + STRETCH, k)
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
def _padded(out, end, align):
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
    # Most rows fit a window that starts at their smallest kept key, and then none of it is wasted.
    # Only where more than one weight in 64 would escape are the binades counted for a better one.
    base = smallest >> dropped
    escaped = _distances(kept_K, k, key_mask, dropped, base, limit, delta_K)
    if escaped * 64 > k:
        _count_binades(kept_K, k, key_mask, dropped, base, stored, counts)
        base += _best_base(counts, radix) << stored
        escaped = _distances(kept_K, k, key_mask, dropped, base, limit, delta_K)
    if emit != RECORDS:
        return escaped, base, at
    if k < columns:
        at = _padded(out, at + (columns + 7) // 8, align)
    _write_values(kept_K, delta_K, k, bits - 1, stored, out, at)
    at = _padded(out, at + (k * (stored + 1) + 7) // 8, align)
    if digits:
        _write_codes(delta_K, k, stored, radix, digits, code_K, out, at)
        at = _padded(out, at + (k + digits - 1) // digits, align)
    if escaped:
        end = _write_escapes(kept_K, delta_K, k, limit, out, at)
        at = _padded(out, end, align)
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
    """Decide which weights of a row block stay, and write what is asked of them.

    Args:
        w_RC: uint16 or uint32 [R, C], contiguous.
        number_format: (key mask as w_RC's dtype, key of infinity, bits, float32 shift, scale), see
            `emp_kernels.numbers.NumberFormat`.
        layout: (dropped bits, stored bits, radix, digits, limit, align), see
            `emp_kernels.layout.RowLayout`.
        rule: (beta · slack, threshold, ties), as for `emp_kernels.cpu.decide.decide_row`.
        start: (row to begin with, bytes already written, how many weights of that row stay where
            float64 could not decide, or −1).
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
        (status, row it refers to, bytes written): DONE, NOT_FINITE or DOUBTFUL. After DOUBTFUL,
        call again and start with that row, those bytes and the row's exact count: what was written
        before is complete, and the doubtful row has left nothing.
    """
    key_mask, infinity, bits, shift, scale = number_format
    _, fixed_threshold, ties_left = rule
    rows, columns = w_RC.shape
    mask = np.empty((columns + 7) // 8 + SCRATCH_SLACK, np.uint8)
    counts = np.empty(MAX_BINADES, np.int64)
    guess = np.int64(0)
    first, at, forced = start
    for r in range(first, rows):
        w_C = w_RC[r]
        largest = largest_key(w_C, key_mask)
        if largest >= infinity:
            return NOT_FINITE, r, at
        s1, s2 = row_sums(w_C, key_mask, np.uint64(shift), scale)
        count = forced if r == first else np.int64(-1)
        k, threshold, tie_end, ties = decide_row(
            w_C, key_mask, largest, s1, s2, rule, count, ties_left, guess
        )
        if k < 0:
            return DOUBTFUL, r, at
        ties_left -= ties
        put_three(table_R3, r, k, 0, 0)
        if k == 0:
            put_three(stats_R3, r, s1, s2, 0.0)
            if emit == ROWS:
                dense_RC[r] = 0
            continue
        guess = threshold  # rows of one matrix have thresholds that are near each other
        # the mask is the first section of a record: with RECORDS it goes to its place at once, and
        # is overwritten by the values where all weights stay and none is stored
        if emit == RECORDS:
            compress_row(w_C, key_mask, threshold, tie_end, kept_K, out, at, simd)
        else:
            compress_row(w_C, key_mask, threshold, tie_end, kept_K, mask, 0, simd)
        mass = kept_sum(kept_K, k, key_mask, np.uint64(shift), scale)
        put_three(stats_R3, r, s1, s2, mass)
        if emit == ROWS:
            _write_row(w_C, key_mask, threshold, tie_end, dense_RC[r])
            continue
        # the k-th largest key is the smallest that stays; a threshold may be the key of no weight
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
        put_three(table_R3, r, k, escaped, base)
    return DONE, rows, at
