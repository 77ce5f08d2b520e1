"""The rule and the packed row in plain numpy and Python: every kernel is tested against it.

Slow and readable on purpose. The rule is arXiv 2509.25606:

    S1 = Σ s_i     S2 = Σ s_i²     N_eff = S1² / S2
    k = min(N, max(1, floor(β · N_eff · (1 + 1e-9))))

with N_eff = k = 0 where S2 = 0. The k largest scores are kept, the earlier of equal ones first.
"""

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from emp_kernels.counting import exact_count, trusted_count
from emp_kernels.layout import RowLayout
from emp_kernels.rows import Patterns

__all__ = [
    "choose_base",
    "distances",
    "effective_number",
    "escape_places",
    "keep_count",
    "keep_mask",
    "pack_row",
    "unpack_row",
]

Scores = npt.NDArray[np.floating]


def _moments(scores: Scores) -> tuple[float, float]:
    """Correctly rounded S1 and S2, of scores scaled by a power of two.

    The scale leaves N_eff as it is, and keeps squares from overflow and underflow.
    """
    values = scores.astype(np.float64).ravel()
    if not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("scores must be finite and not negative")
    largest = float(values.max(initial=0.0))
    if largest == 0.0:
        return 0.0, 0.0
    scaled = np.ldexp(values, -math.frexp(largest)[1])
    return math.fsum(scaled), math.fsum(scaled * scaled)


def effective_number(scores: Scores) -> float:
    """N_eff = (Σs)² / Σs² of one group of scores; 0.0 if all are zero.

    >>> effective_number(np.array([1.0, 1.0, 1.0, 1.0]))
    4.0
    >>> effective_number(np.array([3.0, 1.0, 0.0, 0.0]))
    1.6
    """
    s1, s2 = _moments(scores)
    return s1 * s1 / s2 if s2 else 0.0


def keep_count(scores: Scores, beta: float) -> int:
    """How many of a group's scores the rule keeps.

    >>> keep_count(np.array([3.0, 1.0, 0.0, 0.0]), beta=1.0)
    1
    >>> keep_count(np.array([3.0, 1.0, 0.0, 0.0]), beta=1.5)
    2
    """
    count = trusted_count(*_moments(scores), scores.size, beta)
    if count is None:
        exact = [Fraction(float(score)) for score in scores.ravel()]
        count = exact_count(sum(exact, Fraction(0)), sum(s * s for s in exact), scores.size, beta)
    return count


def keep_mask(scores: Scores, beta: float) -> npt.NDArray[np.bool_]:
    """Which of a group's scores the rule keeps, in the shape of scores.

    >>> keep_mask(np.array([1.0, 2.0, 1.0, 1.0]), beta=0.5)
    array([False,  True, False, False])
    """
    order = np.argsort(-scores.astype(np.float64).ravel(), kind="stable")
    mask = np.zeros(scores.size, dtype=np.bool_)
    mask[order[: keep_count(scores, beta)]] = True
    return mask.reshape(scores.shape)


def distances(keys: list[int], base: int, layout: RowLayout) -> list[int]:
    """How far keys lie above the base of a window, `layout.limit` for those that escape.

    Keys escape that lie outside the window, and those whose dropped bits are not all zero.
    """
    away = [(key >> layout.dropped_bits) - base for key in keys]
    whole = [key % (1 << layout.dropped_bits) == 0 for key in keys]
    return [
        d if exact and 0 <= d < layout.limit else layout.limit
        for d, exact in zip(away, whole, strict=True)
    ]


def choose_base(keys: list[int], layout: RowLayout) -> int:
    """Where the window of a row starts, given its kept keys.

    At the smallest of them, unless more than one weight in 64 would escape: then at the first of
    the binades above it from which `radix` binades together hold most weights.
    """
    smallest = min(keys) >> layout.dropped_bits
    if 64 * distances(keys, smallest, layout).count(layout.limit) <= len(keys):
        return smallest
    binade = [((key >> layout.dropped_bits) - smallest) >> layout.stored_bits for key in keys]
    starts = range(256 - layout.radix + 1)
    inside = [sum(start <= b < start + layout.radix for b in binade) for start in starts]
    return smallest + (inside.index(max(inside)) << layout.stored_bits)


def pack_row(
    weights: Patterns, keep: npt.NDArray[np.bool_], layout: RowLayout
) -> tuple[int, int, int, bytes]:
    """The record of one row.

    Args:
        weights: uint16 or uint32 [C], bit patterns.
        keep: bool [C], which of them stay.
        layout: The tensor's layout.

    Returns:
        (weights kept, how many of them escape, base of the window, record).
    """
    number_format = layout.number_format
    kept = [int(bits) for bits in weights[keep]]
    if not kept:
        return 0, 0, 0, b""
    keys = [bits & number_format.key_mask for bits in kept]
    base = choose_base(keys, layout)
    distance = distances(keys, base, layout)
    escapes = [bits for bits, away in zip(kept, distance, strict=True) if away == layout.limit]

    stored, width = layout.stored_bits, layout.stored_bits + 1
    values = 0
    for j, (bits, away) in enumerate(zip(kept, distance, strict=True)):
        sign = bits >> (number_format.bits - 1)
        values |= (sign << stored | away & ((1 << stored) - 1)) << (j * width)
    codes = b""
    if layout.digits:
        length = -(-len(kept) // layout.digits)
        totals = [0] * length
        for j, away in enumerate(distance):
            totals[j % length] += (away >> stored) * layout.radix ** (j // length)
        codes = bytes(totals)
    sections = [
        np.packbits(keep, bitorder="little").tobytes() if len(kept) < weights.size else b"",
        values.to_bytes((len(kept) * width + 7) // 8, "little"),
        codes,
        b"".join(bits.to_bytes(number_format.item_bytes, "little") for bits in escapes),
    ]
    return len(kept), len(escapes), base, b"".join(_pad(part, layout.align) for part in sections)


def _pad(section: bytes, align: int) -> bytes:
    return section + bytes(-len(section) % align)


def unpack_row(record: bytes, kept: int, escaped: int, base: int, layout: RowLayout) -> Patterns:
    """The weights of one row, uint16 or uint32 [C], from its record and its line of the table.

    Raises:
        ValueError: If the two contradict each other, or a weight is NaN or infinite.
    """
    number_format = layout.number_format
    mask_part, value_part, code_part, escape_part = _parts(record, kept, escaped, layout)
    row = np.zeros(layout.columns, number_format.storage)
    if kept:
        keep = _read_mask(mask_part, kept, layout.columns)
        pairs = _read_distances(value_part, code_part, kept, layout)
        row[keep] = _read_weights(
            pairs, escape_part[: escaped * number_format.item_bytes], base, layout
        )
    return row


def escape_places(record: bytes, kept: int, escaped: int, layout: RowLayout) -> list[int]:
    """Which of a row's kept weights are stored aside, by their places among all that are kept."""
    _, value_part, code_part, _ = _parts(record, kept, escaped, layout)
    pairs = _read_distances(value_part, code_part, kept, layout)
    return [j for j, (_, distance) in enumerate(pairs) if distance == layout.limit]


def _parts(record: bytes, kept: int, escaped: int, layout: RowLayout) -> list[bytes]:
    """The four sections of a record."""
    counts = np.array([kept], np.int64), np.array([escaped], np.int64)
    ends = np.cumsum(layout.sections(*counts)[0])
    return [record[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _read_mask(part: bytes, kept: int, columns: int) -> npt.NDArray[np.bool_]:
    if kept == columns:
        return np.ones(columns, np.bool_)
    bits = np.unpackbits(np.frombuffer(part[: (columns + 7) // 8], np.uint8), bitorder="little")
    if bits.sum() != kept or bits[columns:].any():
        raise ValueError("its mask names another number of weights than its table line")
    return bits[:columns].astype(np.bool_)


def _read_distances(
    values: bytes, codes: bytes, kept: int, layout: RowLayout
) -> list[tuple[int, int]]:
    """The sign of each kept weight, and its distance from the base of the window."""
    bits, width = int.from_bytes(values, "little"), layout.stored_bits + 1
    length = -(-kept // layout.digits) if layout.digits else 1
    pairs = []
    for j in range(kept):
        value = bits >> (j * width) & ((1 << width) - 1)
        code = codes[j % length] // layout.radix ** (j // length) if layout.digits else 0
        low = value & ((1 << layout.stored_bits) - 1)
        pairs.append(
            (value >> layout.stored_bits, low + (code % layout.radix << layout.stored_bits))
        )
    return pairs


def _read_weights(
    pairs: list[tuple[int, int]], escapes: bytes, base: int, layout: RowLayout
) -> list[int]:
    number_format = layout.number_format
    size = number_format.item_bytes
    escaped = [
        int.from_bytes(escapes[at : at + size], "little") for at in range(0, len(escapes), size)
    ]
    if sum(distance == layout.limit for _, distance in pairs) != len(escaped):
        raise ValueError("it marks another number of escapes than its table line")
    weights = []
    for sign, distance in pairs:
        key = (base + distance) << layout.dropped_bits
        if distance == layout.limit:
            weights.append(escaped.pop(0))
            key = weights[-1] & number_format.key_mask
        else:
            weights.append(sign << (number_format.bits - 1) | key)
        if key >= number_format.infinity:
            raise ValueError("it holds NaN or infinity")
    return weights
