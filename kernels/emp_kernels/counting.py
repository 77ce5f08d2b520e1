"""How many scores to keep: the one integer on which every backend must agree to the last bit.

    k = min(N, max(1, floor(β · N_eff · (1 + 1e-9))))      N_eff = S1² / S2      0 where S2 = 0

Float64 sums taken in different orders differ in their last bits, and where β · N_eff lies next to
an integer the floor would differ too. Backends add in different orders (vector lanes, tiles,
threads), yet must write the same bytes. So a float64 result is believed only if no order could
change its floor; the rest, about one group in a million, is decided in exact integers.
"""

from collections.abc import Iterable
from fractions import Fraction

import numpy as np

from emp_kernels.numbers import NumberFormat
from emp_kernels.rows import Patterns

__all__ = [
    "SLACK",
    "doubt",
    "exact_count",
    "exact_sums",
    "exact_sums_of",
    "first_beta",
    "trusted_count",
]

SLACK = 1.0 + 1e-9
"""Part of the rule: N_eff of N equal scores is N in exact arithmetic, but may come out a little
less in float64; with this factor all of them are kept."""


def trusted_count(s1: float, s2: float, n: int, beta: float) -> int | None:
    """The count from float64 sums of n scores, or None where rounding could decide it.

    A float64 sum of n non-negative terms is within a relative n · 2**-53 of the exact one in
    whatever order it is taken (Higham, "Accuracy and Stability of Numerical Algorithms", 4.2), if
    the terms are exact. They are: a weight of 32 bits or fewer has a mantissa of at most 24 bits,
    and its square of at most 48.

    Args:
        s1: Sum of the scores.
        s2: Sum of their squares.
        n: Number of scores.
        beta: Multiplier of the effective number.
    """
    # not only what float64 gives, but the two ends of where the exact value can be, must have the
    # same floor
    if s2 == 0.0:
        return 0
    estimate = beta * SLACK * (s1 * s1 / s2)
    if estimate >= 2.0 * n:
        return n
    error = estimate * doubt(n)
    low, high = int(min(estimate - error, n)), int(min(estimate + error, n))
    if low != high:
        return None
    return min(n, max(1, low))


def doubt(n: int) -> float:
    """How far β · N_eff from float64 sums of n scores can be from the exact one, relatively.

    Twice the error of S1, once that of S2, and 16 roundings to spare for the operations on them.
    """
    return (3 * n + 16) * 2.0**-53


def exact_count(s1: Fraction | int, s2: Fraction | int, n: int, beta: float) -> int:
    """The count in exact arithmetic, from exact sums of n scores in any common unit."""
    if s2 == 0:
        return 0
    product = Fraction(beta) * Fraction(SLACK) * Fraction(s1) ** 2 / Fraction(s2)
    return min(n, max(1, int(product)))


def exact_sums(parts: Iterable[tuple[int, int, int]]) -> tuple[Fraction, Fraction]:
    """Exact sums of scores and of their squares.

    Args:
        parts: Triples (e, a, b), each standing for scores m · 2**e with integers m whose sum is a
            and the sum of whose squares is b.
    """
    terms = list(parts)
    lowest = min((e for e, _, _ in terms), default=0)
    s1 = sum(a << (e - lowest) for e, a, _ in terms)
    s2 = sum(b << 2 * (e - lowest) for e, _, b in terms)
    unit = Fraction(2) ** lowest
    return s1 * unit, s2 * unit * unit


def exact_sums_of(weights: Patterns, number_format: NumberFormat) -> tuple[Fraction, Fraction]:
    """Exact Σ|w| and Σw² of weights given as bit patterns, of any shape."""
    keys, counts = np.unique(weights & number_format.key_mask, return_counts=True)
    terms = []
    for key, count in zip(keys.tolist(), counts.tolist(), strict=True):
        m, e = number_format.significand(key)
        terms.append((e, count * m, count * m * m))
    return exact_sums(terms)


def first_beta(k: int, s1: Fraction, s2: Fraction) -> Fraction:
    """The least β at which a group with these exact sums keeps k scores; k from 2 to its size."""
    return k * s2 / (Fraction(SLACK) * s1 * s1)
