"""Where the bytes of a whole record lie: weights that are all kept, every bit of them.

A whole record holds n weights of a tensor that is not pruned. Sign and mantissa of a weight are its
*value*, stored as they are; its exponent is stored by a prefix code. The code has *tiers*. A tier
of w bits has codes for the next 2**w − 1 exponents of a list, and one more, all bits set, which
says that the exponent comes later: the next tier has its code. Weights past the last tier *escape*.
There are four lists, of the same exponents: the two highest mantissa bits of a weight, its
*context*, say which one is its.

    values   the low bytes of all values, then the next bytes, ...; then the bits left, as stripes
    tiers    for each tier its w bits, as stripes, of the weights that get to it
    escapes  for each weight that escapes its exponent and dropped bits, as whole bytes

A *stripe* is one bit of each of some weights, eight to a byte, the first weight in the lowest bit.

`FORMAT.md` of emp_llm is the specification; names here are the ones used there.
"""

from dataclasses import dataclass

from emp_kernels.numbers import NumberFormat

__all__ = ["MAX_LISTS", "MAX_SYMBOLS", "MAX_TIERS", "MAX_WIDTH", "WholeLayout", "context_bits"]

MAX_TIERS = 8
"""The most tiers of a code."""

MAX_WIDTH = 3
"""The most bits of a tier."""

MAX_SYMBOLS = MAX_TIERS * ((1 << MAX_WIDTH) - 1)
"""The most exponents that a code can have symbols for."""

_MAX_CONTEXT_BITS = 2

MAX_LISTS = 1 << _MAX_CONTEXT_BITS
"""Lists of exponents, unless fewer than two mantissa bits are stored."""


def context_bits(stored_bits: int) -> int:
    """Bits of a context, of so many stored bits: the highest two, or as many as there are."""
    return max(0, min(_MAX_CONTEXT_BITS, stored_bits))


@dataclass(frozen=True, kw_only=True)
class WholeLayout:
    """The parameters that all whole records of one packed tensor share.

    Attributes:
        number_format: Format of the weights.
        weights: Weights in a record, n; the last record of a tensor may have fewer.
        widths: Bits of each tier.
        exponents: A list for each context: the exponents that the code has symbols for, the
            shortest codes first; exactly as many as the tiers have room for, Σ (2**w − 1), and
            the same ones in all lists.
        dropped_bits: Trailing mantissa bits that are not stored; weights in which they are not all
            zero escape.
    """

    number_format: NumberFormat
    weights: int
    widths: tuple[int, ...]
    exponents: tuple[tuple[int, ...], ...]
    dropped_bits: int = 0

    def __post_init__(self) -> None:
        mantissa = self.number_format.mantissa_bits
        if self.weights < 1:
            raise ValueError(f"a record of {self.weights} weights; it has at least one")
        if not 0 <= self.dropped_bits <= mantissa:
            raise ValueError(
                f"dropped_bits is {self.dropped_bits}; {self.number_format.name} has {mantissa} "
                "mantissa bits"
            )
        if not 1 <= len(self.widths) <= MAX_TIERS:
            raise ValueError(f"{len(self.widths)} tiers; there are 1 to {MAX_TIERS}")
        if not all(1 <= width <= MAX_WIDTH for width in self.widths):
            raise ValueError(f"tiers of {self.widths} bits; each has 1 to {MAX_WIDTH}")
        room = sum((1 << width) - 1 for width in self.widths)
        if room > 1 << self.exponent_bits:
            raise ValueError(f"tiers of {self.widths} bits have room for {room} exponents")
        self._check_lists(room)

    def _check_lists(self, room: int) -> None:
        lists = 1 << self.context_bits
        if len(self.exponents) != lists:
            raise ValueError(f"{len(self.exponents)} lists of exponents; there are {lists}")
        first = self.exponents[0]
        if len(first) != room or len(set(first)) != room:
            raise ValueError(f"{len(first)} exponents; the tiers need {room} different")
        if not all(0 <= exponent < 1 << self.exponent_bits for exponent in first):
            raise ValueError(f"an exponent has {self.exponent_bits} bits")
        if not all(sorted(other) == sorted(first) for other in self.exponents):
            raise ValueError("its lists have not all the same exponents")

    @property
    def exponent_bits(self) -> int:
        """Bits of an exponent: 8; of float16, 5."""
        return self.number_format.bits - 1 - self.number_format.mantissa_bits

    @property
    def symbols(self) -> int:
        """Exponents of a list; the symbol of a weight that escapes."""
        return len(self.exponents[0])

    @property
    def context_bits(self) -> int:
        """Highest bits of the mantissa that choose the list of a weight."""
        return context_bits(self.stored_bits)

    @property
    def stored_bits(self) -> int:
        """Mantissa bits that are stored, s."""
        return self.number_format.mantissa_bits - self.dropped_bits

    @property
    def value_bits(self) -> int:
        """Bits of a value, 1 + s: the sign above the stored bits of the mantissa."""
        return 1 + self.stored_bits

    @property
    def escape_bytes(self) -> int:
        """Bytes of an escape: its exponent above its dropped bits."""
        return (self.exponent_bits + self.dropped_bits + 7) // 8

    @property
    def longest_record(self) -> int:
        """The most bytes of a record: those it has if all weights get to all tiers, and escape."""
        stripes = self.value_bits % 8 + sum(self.widths)
        whole_bytes = self.value_bits // 8 + self.escape_bytes
        return self.weights * whole_bytes + (self.weights + 7) // 8 * stripes

    def records(self, weights: int) -> int:
        """How many records so many weights take."""
        return -(-weights // self.weights)
