"""Bytes and sums of rows at many numbers of kept weights at once, from one sort of each row.

To prune and pack a row for each of some hundred values of β would read it that often. Here its keys
are sorted once. Where k weights stay, they are the first k of the sorted ones: binary searches find
the smallest kept key, the kept sum and the escapes for any k. Which of equal weights stay makes no
difference to them.

Legend: w_RC are bit patterns, R rows of C weights; counts_RP says how many weights of each row stay
at each of P points, layout_PL in which layout they would be packed there. A row's *runs* are its
distinct keys, largest first, D of them: key_D, and reach_D, how many weights have that key or a
larger one; count_D, how many have that key.
"""

import numba
import numpy as np

from emp_kernels.cpu.decide import count_from_sums
from emp_kernels.cpu.select import largest_key, row_sums
from emp_kernels.cpu.simd import bits_to_f32
from emp_kernels.cpu.status import DONE, NOT_FINITE

__all__ = ["count_block", "sweep_block", "trailing_zeros"]

_njit = numba.njit(nogil=True, cache=True)
_sums = numba.njit(nogil=True, cache=True, fastmath={"reassoc", "contract"})

_KEYS = 1 << 15
"""Keys of a format of 16 bits."""

_DIGIT_BITS = 11
_DIGITS = 3
"""Digits of a key of 31 bits, for the radix sort: the counts of one digit take 16 kB, which fit the
L1 cache."""


@_njit
def count_block(w_RC, number_format, beta_slack_B, stats_R2, counts_RB):
    """Sums of each row, and its count at each β, −1 where float64 cannot decide it.

    Returns:
        (status, row it refers to).
    """
    key_mask, infinity, _, shift, scale = number_format
    for r in range(w_RC.shape[0]):
        w_C = w_RC[r]
        if largest_key(w_C, key_mask) >= infinity:
            return NOT_FINITE, r
        s1, s2 = row_sums(w_C, key_mask, np.uint64(shift), scale)
        stats_R2[r, 0] = s1
        stats_R2[r, 1] = s2
        for b in range(beta_slack_B.size):
            counts_RB[r, b] = count_from_sums(s1, s2, w_C.size, beta_slack_B[b])
    return DONE, 0


@_njit
def _runs_of_16(w_C, key_mask, hist, key_D, reach_D):
    """Find the runs of a row of 16-bit weights by counting each key; returns how many there are.

    `hist`, one count for each key there can be, is all zeros before, and again afterwards: only
    what the row has counted is cleared, not all 128 kB for each row.
    """
    number = w_C.dtype.type
    largest, smallest = number(0), ~number(0)
    for c in range(w_C.size):
        key = number(w_C[c] & key_mask)
        largest = max(largest, key)
        # zeros may lie far below all other keys: minus 1 they wrap to the top, and do not count
        smallest = min(smallest, number(key - number(1)))
    for c in range(w_C.size):
        hist[w_C[c] & key_mask] += 1
    runs, reach = 0, 0
    if largest:
        # all keys from the largest to the smallest, whether the row has them or not: each is
        # written, and the next over it unless it is a run, so that there is no branch
        for key in range(np.int64(largest), np.int64(smallest), -1):
            count = np.int64(hist[key])
            hist[key] = 0
            reach += count
            key_D[runs] = key
            reach_D[runs] = reach
            runs += np.int64(count != 0)
    if hist[0]:
        key_D[runs] = 0
        reach_D[runs] = reach + np.int64(hist[0])
        hist[0] = 0
        runs += 1
    return runs


@_njit
def _runs_of_32(w_C, key_mask, places, key_D, other_D, reach_D):
    """Sort the keys of a row of 32-bit weights, largest first, as C runs of one weight.

    A radix sort from the lowest digit on: each pass is stable, so after the last one keys are in
    order. All digits are counted in one read, and complemented, so that large keys come first.
    """
    digit = np.uint32((1 << _DIGIT_BITS) - 1)
    places[:] = 0
    for c in range(w_C.size):
        rest = ~w_C[c] & key_mask
        for d in range(_DIGITS):
            places[d, rest & digit] += 1
            rest >>= np.uint32(_DIGIT_BITS)
    for d in range(_DIGITS):  # counts become the place where each digit's first key goes
        at = 0
        for value in range(1 << _DIGIT_BITS):
            at, places[d, value] = at + places[d, value], at
    for c in range(w_C.size):
        key = w_C[c] & key_mask
        value = ~key & digit
        other_D[places[0, value]] = key
        places[0, value] += 1
    for c in range(w_C.size):
        key = other_D[c]
        value = ((~key & key_mask) >> np.uint32(_DIGIT_BITS)) & digit
        key_D[places[1, value]] = key
        places[1, value] += 1
    for c in range(w_C.size):
        key = key_D[c]
        value = (~key & key_mask) >> np.uint32(2 * _DIGIT_BITS)
        other_D[places[2, value]] = key
        places[2, value] += 1
    for c in range(w_C.size):
        key_D[c] = other_D[c]
        reach_D[c] = c + 1
    return w_C.size


@_njit
def _scratch(w_RC):
    """Memory for `_runs`: where a row's runs go, and what finding them takes."""
    columns, narrow = w_RC.shape[1], w_RC.itemsize == 2
    return (
        np.empty(columns + 1, w_RC.dtype),
        np.empty(columns + 1, np.int64),
        np.zeros(_KEYS if narrow else 1, np.uint32),
        np.empty((_DIGITS, 1 if narrow else 1 << _DIGIT_BITS), np.int64),
        np.empty(1 if narrow else columns, w_RC.dtype),
    )


@_njit
def _runs(w_C, key_mask, scratch):
    """Find the runs of a row; returns how many. They are the first of the scratch's first two."""
    key_D, reach_D, hist, places, other_D = scratch
    if w_C.itemsize == 2:
        return _runs_of_16(w_C, key_mask, hist, key_D, reach_D)
    return _runs_of_32(w_C, key_mask, places, key_D, other_D, reach_D)


@_sums
def _mass_of_runs(key_D, count_D, start, stop, shift, scale):
    """Σ|w| over runs."""
    total = 0.0
    for d in range(start, stop):
        magnitude = np.float64(bits_to_f32(np.uint64(key_D[d]) << shift)) * scale
        total += magnitude * count_D[d]
    return total


@_njit
def _runs_within(key_D, runs, bound):
    """How many of the first `runs` runs have a key of at least `bound`: a binary search."""
    low = 0
    while runs > 1:
        half = runs >> 1
        # arithmetic, for a branch would be mispredicted every other time
        low += half * np.int64(np.int64(key_D[low + half - 1]) >= bound)
        runs -= half
    return low + np.int64(runs == 1 and np.int64(key_D[low]) >= bound)


@_njit
def _runs_from(key_D, runs, bound):
    """As `_runs_within`, faster where few runs do: searched from the front, ever further."""
    near = 8
    while near < runs and np.int64(key_D[near - 1]) >= bound:
        near <<= 3
    return _runs_within(key_D, min(near, runs), bound)


@_njit
def _run_of(reach_D, low, runs, k):
    """The run that the k-th largest weight lies in, known to be `low` or one behind it.

    Points come in order of k, so it is near as a rule: the search goes on from there, in ever
    longer steps, then by halves.
    """
    left = 32
    while low + left < runs and reach_D[low + left - 1] < k:
        low += left
        left <<= 1
    left = min(left, runs - low)
    while left > 1:
        half = left >> 1
        low += half * np.int64(reach_D[low + half - 1] < k)
        left -= half
    return low


@_njit
def _up_to(reach_D, run, kept):
    """How many kept weights the first `run` runs have: of the last kept run some may not stay."""
    return min(reach_D[run - 1], kept) if run else np.int64(0)


@_njit
def _kept_from(key_D, reach_D, last, k, bound):
    """How many of the k largest weights have a key of at least `bound`."""
    return _up_to(reach_D, _runs_from(key_D, last + 1, bound), k)


@_njit
def _count_exact(key_D, reach_D, runs, lost, exact_D):
    """Compute exact_D: like reach_D, of the weights whose dropped bits are all zero."""
    total, before = np.int64(0), np.int64(0)
    for d in range(runs):
        if np.int64(key_D[d]) & lost == 0:
            total += reach_D[d] - before
        before = reach_D[d]
        exact_D[d] = total


@_njit
def _escapes(key_D, reach_D, exact_D, last, k, layout_L):
    """How many of the k largest weights of a row escape.

    The window is chosen as in `emp_kernels.reference.choose_base`: at the smallest kept key, or if
    more than one weight in 64 would escape, at the binade from which `radix` hold most weights.

    Args:
        key_D: The row's runs.
        reach_D: How many weights they reach.
        exact_D: reach_D of the weights whose dropped bits are zero.
        last: The run of the smallest kept weight.
        k: Weights that stay, at least 1.
        layout_L: The layout, as for `sweep_block`.
    """
    dropped, stored, radix, limit = layout_L[0], layout_L[1], layout_L[2], layout_L[4]
    smallest = np.int64(key_D[last]) >> dropped
    before = reach_D[last - 1] if last else np.int64(0)
    whole_before = exact_D[last - 1] if last else np.int64(0)
    whole = whole_before + (k - before if exact_D[last] > whole_before else 0)
    outside = _up_to(exact_D, _runs_from(key_D, last + 1, (smallest + limit) << dropped), whole)
    escaped = k - (whole - outside)
    if escaped * 64 <= k:
        return escaped
    # From the window that ends at the largest key downwards. Of equally good windows the lowest
    # counts, so `>=`; and once fewer weights than `most` lie below a window's end, no lower one can
    # hold more.
    best = max(((np.int64(key_D[0]) >> dropped) - smallest >> stored) + 1 - radix, 0)
    most = _kept_from(key_D, reach_D, last, k, (smallest + (best << stored)) << dropped)
    for b in range(best - 1, -1, -1):
        above = _kept_from(key_D, reach_D, last, k, (smallest + (b + radix << stored)) << dropped)
        if k - above < most:
            break
        inside = _kept_from(key_D, reach_D, last, k, (smallest + (b << stored)) << dropped) - above
        if inside >= most:
            best, most = b, inside
    base = smallest + (best << stored)
    inside = whole
    if best:
        inside = _up_to(exact_D, _runs_within(key_D, last + 1, base << dropped), whole)
    outside = _up_to(exact_D, _runs_from(key_D, last + 1, (base + limit) << dropped), whole)
    return k - (inside - outside)


@_njit
def trailing_zeros(w_RC, number_format, counts_RB, found_BZ):
    """Count the kept weights, but for zeros, by the trailing zero bits of their keys.

    Args:
        w_RC: uint16 or uint32 [R, C], contiguous, all finite.
        number_format: As for `sweep_block`.
        counts_RB: int64 [R, B], 0 to C.
        found_BZ: int64 [B, 32], written.
    """
    key_mask = number_format[0]
    scratch = _scratch(w_RC)
    found_Z = np.empty(found_BZ.shape[1], np.int64)
    found_BZ[:] = 0
    for r in range(w_RC.shape[0]):
        _runs(w_RC[r], key_mask, scratch)
        key_D, reach_D = scratch[0], scratch[1]
        run, k = 0, np.int64(0)
        found_Z[:] = 0
        for b in range(counts_RB.shape[1]):
            if counts_RB[r, b] < k:
                run, k = 0, np.int64(0)
                found_Z[:] = 0
            while k < counts_RB[r, b]:
                more = min(reach_D[run], counts_RB[r, b]) - k
                key = np.int64(key_D[run])
                if key:
                    zeros = 0
                    while not key & 1:
                        zeros += 1
                        key >>= 1
                    found_Z[zeros] += more
                k += more
                run += np.int64(k == reach_D[run])
            found_BZ[b] += found_Z


@_njit
def _record_bytes(k, escaped, columns, item_bytes, stored, digits, align):
    """The sum of `emp_kernels.layout.RowLayout.sections` for one row."""
    mask = (columns + 7) // 8 if 0 < k < columns else 0
    codes = (k + digits - 1) // digits if digits else 0
    total = 0
    for length in (mask, (k * (stored + 1) + 7) // 8, codes, escaped * item_bytes):
        total += (length + align - 1) & -align  # a power of two
    return total


@_njit
def sweep_block(w_RC, number_format, counts_RP, layout_PL, escaped_RP, mass_RP, bytes_P):
    """Compute what each row would come to at each point.

    Args:
        w_RC: uint16 or uint32 [R, C], contiguous, all finite.
        number_format: (key mask as w_RC's dtype, key of infinity, bits, float32 shift, scale).
        counts_RP: int64 [R, P], 0 to C; 0 or more than 0 in all of a row.
        layout_PL: int64 [P, 6]: dropped bits, stored bits, radix, digits, limit, align.
        escaped_RP: int64 [R, P], written: weights that escape.
        mass_RP: float64 [R, P], written: Σ_kept |w|.
        bytes_P: int64 [P], written: bytes of all records.
    """
    key_mask, _, _, shift, scale = number_format
    shift = np.uint64(shift)
    rows, columns = w_RC.shape
    points = layout_PL.shape[0]
    scratch = _scratch(w_RC)
    key_D, reach_D = scratch[0], scratch[1]
    count_D = np.empty(columns + 1, np.float64)
    exact_D = np.empty(columns + 1, np.int64)
    bytes_P[:] = 0
    for r in range(rows):
        runs = _runs(w_RC[r], key_mask, scratch)
        before = np.int64(0)
        for d in range(runs):
            count_D[d] = np.float64(reach_D[d] - before)
            before = reach_D[d]
        exact_of = np.int64(-1)
        last, mass = 0, 0.0
        length = np.int64(0)
        for p in range(points):
            k = counts_RP[r, p]
            dropped, stored = layout_PL[p, 0], layout_PL[p, 1]
            digits, align = layout_PL[p, 3], layout_PL[p, 5]
            if k == 0:
                escaped_RP[r, p] = 0
                mass_RP[r, p] = 0.0
                continue
            if p and k == counts_RP[r, p - 1]:
                same = True
                for field in range(layout_PL.shape[1]):
                    same &= layout_PL[p, field] == layout_PL[p - 1, field]
                mass_RP[r, p] = mass_RP[r, p - 1]
                if same:
                    escaped_RP[r, p] = escaped_RP[r, p - 1]
                    bytes_P[p] += length
                    continue
            else:  # the sum goes on from the point before, unless that kept more
                if p and k < counts_RP[r, p - 1]:
                    last, mass = 0, 0.0
                run = _run_of(reach_D, last, runs, k)
                mass += _mass_of_runs(key_D, count_D, last, run, shift, scale)
                last = run
                part = np.float64(k - (reach_D[run - 1] if run else 0))
                smallest = np.float64(bits_to_f32(np.uint64(key_D[run]) << shift)) * scale
                mass_RP[r, p] = mass + part * smallest
            if dropped and dropped != exact_of:
                _count_exact(key_D, reach_D, runs, (np.int64(1) << dropped) - 1, exact_D)
                exact_of = dropped
            exact = exact_D if dropped else reach_D
            escaped = _escapes(key_D, reach_D, exact, last, k, layout_PL[p])
            length = _record_bytes(k, escaped, columns, w_RC.itemsize, stored, digits, align)
            escaped_RP[r, p] = escaped
            bytes_P[p] += length
