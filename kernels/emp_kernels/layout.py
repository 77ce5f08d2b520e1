"""Where the bytes of a packed row lie: arithmetic shared by every encoder and decoder.

A packed row keeps k of C weights. Its record has up to four sections, in this order, each starting
at a multiple of ``align`` bytes from the start of the first record:

    mask     C bits, absent where k is 0 or C
    values   k × (1 + stored_bits) bits: sign and low bits of each kept weight
    codes    base-``radix`` digits, ``digits`` to a byte: the binade of each kept weight
    escapes  the whole weights that lie outside the row's window

`FORMAT.md` of emp_llm is the specification; names here are the ones used there.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emp_kernels.numbers import NumberFormat

__all__ = ["DIGITS", "RADICES", "RowLayout"]

DIGITS = {1: 0, 2: 8, 3: 5, 4: 4, 6: 3, 16: 2}
"""Digits that fit one byte, by radix: the largest d with radix**d ≤ 256; radix 1 needs none."""

RADICES = tuple(DIGITS)


@dataclass(frozen=True, kw_only=True)
class RowLayout:
    """The parameters that all rows of one packed tensor share.

    Attributes:
        number_format: Format of the weights.
        columns: Weights in a row, C.
        dropped_bits: Trailing mantissa bits that are not stored; weights in which they are not all
            zero escape.
        radix: Binades in a row's window; one of 1, 2, 3, 4, 6, 16.
        align: Sections start at multiples of this many bytes; a power of two from 1 to 64.
    """

    number_format: NumberFormat
    columns: int
    dropped_bits: int = 0
    radix: int = 3
    align: int = 1

    def __post_init__(self) -> None:
        if self.columns < 1:
            raise ValueError(f"columns is {self.columns}; a row has at least one weight")
        if not 0 <= self.dropped_bits <= self.number_format.mantissa_bits:
            raise ValueError(
                f"dropped_bits is {self.dropped_bits}; {self.number_format.name} "
                f"has {self.number_format.mantissa_bits} mantissa bits"
            )
        if self.radix not in DIGITS:
            raise ValueError(f"radix is {self.radix}; known are {', '.join(map(str, RADICES))}")
        if self.align not in (1, 2, 4, 8, 16, 32, 64):
            raise ValueError(f"align is {self.align}; it is a power of two from 1 to 64")

    @property
    def digits(self) -> int:
        """Codes in one byte; 0 for radix 1, which stores no codes."""
        return DIGITS[self.radix]

    @property
    def stored_bits(self) -> int:
        """Mantissa bits that are stored, s."""
        return self.number_format.mantissa_bits - self.dropped_bits

    @property
    def limit(self) -> int:
        """Distance from the window's base at which weights escape: radix · 2**s − 1."""
        return (self.radix << self.stored_bits) - 1

    def sections(
        self, kept: npt.NDArray[np.int64], escaped: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Lengths in bytes, padding included, of each row's sections.

        Args:
            kept: int64 [R], weights kept in each row.
            escaped: int64 [R], how many of them escape.

        Returns:
            int64 [R, 4]: mask, values, codes, escapes.
        """
        masked = (kept > 0) & (kept < self.columns)
        mask = masked * ((self.columns + 7) // 8)
        values = (kept * (self.stored_bits + 1) + 7) // 8
        codes = (kept + self.digits - 1) // self.digits if self.digits else np.zeros_like(kept)
        escapes = escaped * self.number_format.item_bytes
        lengths = np.stack([mask, values, codes, escapes], axis=1)
        return (lengths + self.align - 1) // self.align * self.align

    def offsets(
        self, kept: npt.NDArray[np.int64], escaped: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        """Where each row's record starts, in bytes: int64 [R + 1], the last one their end."""
        lengths = self.sections(kept, escaped).sum(axis=1)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])

    @property
    def longest_record(self) -> int:
        """Bytes of the longest record that a row can have: every weight kept and escaped."""
        everything = np.array([self.columns], dtype=np.int64)
        longest = self.sections(everything, everything).sum()
        return int(longest) + (self.columns + 7) // 8 + self.align
