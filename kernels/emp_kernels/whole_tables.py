"""What kernels look up for whole records: exponents by their codes, and back.

A table with an item for each context and place in a list has that of context c and place p at
c · LIST_ROOM + p.
"""

import numpy as np

from emp_kernels.numbers import F16
from emp_kernels.rows import Bytes
from emp_kernels.whole_layout import MAX_LISTS, WholeLayout

__all__ = ["LIST_ROOM", "SHORT_LIST_ROOM", "exponents_of", "numbers_of", "places_of", "short_of"]

LIST_ROOM = 64
"""Places in a table for the list of a context: four of them are all that a byte can tell apart."""

SHORT_LIST_ROOM = 32
"""The same in a table that two vectors hold; nearly all codes have fewer symbols."""


def numbers_of(layout: WholeLayout) -> Bytes:
    """The place of each exponent in the first list, their number for one that is not in it."""
    numbers = np.full(256, layout.symbols, np.uint8)
    numbers[list(layout.exponents[0])] = np.arange(layout.symbols)
    return numbers


def places_of(layout: WholeLayout) -> Bytes:
    """By context and place in the first list, where the exponent is in the context's list."""
    places = np.full((MAX_LISTS, LIST_ROOM), layout.symbols, np.uint8)
    numbers = numbers_of(layout)
    for context, exponents in enumerate(layout.exponents):
        places[context, numbers[list(exponents)]] = np.arange(layout.symbols)
    return places.reshape(-1)


def exponents_of(layout: WholeLayout) -> Bytes:
    """By context and place, the exponents of the lists; zeros elsewhere."""
    exponents = np.zeros((MAX_LISTS, LIST_ROOM), np.uint8)
    exponents[: len(layout.exponents), : layout.symbols] = layout.exponents
    return exponents.reshape(-1)


def short_of(layout: WholeLayout) -> Bytes | None:
    """The same for `SHORT_LIST_ROOM` places, as the highest bytes of weights have the exponents.

    For float16 that is the exponent above the context. In the other formats the lowest bit of the
    exponent is in the next byte, and comes first here: it is the highest bit of that byte.

    Returns:
        uint8 [128]; None if there are more symbols, fewer contexts, or dropped bits.
    """
    if layout.symbols >= SHORT_LIST_ROOM or layout.context_bits != 2 or layout.dropped_bits:
        return None
    lists = exponents_of(layout).reshape(MAX_LISTS, LIST_ROOM)[:, :SHORT_LIST_ROOM].astype(int)
    if layout.number_format is F16:
        bits = lists << 2 | np.arange(MAX_LISTS)[:, None]
    else:
        bits = lists >> 1 | lists << 7
    return bits.astype(np.uint8).reshape(-1)
