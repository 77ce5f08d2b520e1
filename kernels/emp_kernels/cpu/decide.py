"""Which weights of a row stay: how many, from which key on, and which of equal ones.

Legend as in `emp_kernels.cpu.select`.
"""

import numba
import numpy as np

from emp_kernels.cpu.select import count_reaching, kth_key, tie_columns

__all__ = ["count_from_sums", "decide_row"]

_njit = numba.njit(nogil=True, cache=True)


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
def decide_row(w_C, key_mask, largest, s1, s2, rule, count, ties_left, guess):
    """Decide which weights of a row stay.

    Args:
        w_C: The row, all finite.
        key_mask: All bits but the sign, of w_C's dtype.
        largest: Its largest key.
        s1: Sum of its magnitudes.
        s2: Sum of their squares.
        rule: (beta · slack, threshold, ties): with threshold < 0 the row is a group of its own,
            else keys above the threshold stay, and the first `ties` in the group that equal it.
        count: How many weights stay, for a row that is a group; −1 where the rule says.
        ties_left: Of the rule's ties those that earlier rows have not used.
        guess: A key near the threshold, as far as one is known: it only makes the search shorter.

    Returns:
        (k, threshold, tie_end, ties): k weights stay, −1 if float64 cannot decide how many: those
        with keys above the threshold, and those in the first tie_end columns with keys that equal
        it, which are `ties`.
    """
    beta_slack, fixed_threshold, _ = rule
    columns = w_C.size
    if fixed_threshold < 0:
        k = count
        if k < 0:
            k = count_from_sums(s1, s2, columns, beta_slack)
            if k < 0:
                return np.int64(-1), np.int64(0), 0, np.int64(0)
        threshold, reach, exceed = np.int64(largest) + 1, np.int64(0), np.int64(0)
        if k > 0:
            threshold, reach, exceed = kth_key(w_C, key_mask, k, largest, guess)
        ties = k - exceed
    else:
        threshold = np.int64(fixed_threshold)
        reach = count_reaching(w_C, key_mask, threshold)
        exceed = count_reaching(w_C, key_mask, threshold + 1)
        ties = min(reach - exceed, ties_left)
        k = exceed + ties
    tie_end = columns
    if ties < reach - exceed:  # not all equal weights stay: find the column of the last that does
        tie_end = tie_columns(w_C, key_mask, threshold, ties)
    return k, threshold, tie_end, ties
