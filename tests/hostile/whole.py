"""Hostile packed checkpoints: what is spoiled is a tensor that was packed without being pruned."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from hostile.damage import Case
from hostile.packed import META as PRUNED_META
from hostile.packed import Tensors, longer, planes, retyped, without

EMBED = "model.embed_tokens.weight"
VOCABULARY = 3000
"""Rows of 12 weights; 1,366 of them are a record, so there are three."""

ROWS, META = EMBED + ".emp_rows", EMBED + ".emp_meta"

_LIST = 8 * 5  # where the lists of exponents start in the bytes of the parameters, 64 bytes each


def parameter(*changes: tuple[int, int]) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        for field, value in changes:
            tensors[META][field] = value

    return planes(change)


def listed(place: int, exponent: int | None = None) -> Callable[[Path], None]:
    """Set a byte of the lists of exponents; to their first one if it is None."""

    def change(tensors: Tensors) -> None:
        data = tensors[META].view(np.uint8)
        data[_LIST + place] = data[_LIST] if exponent is None else exponent

    return planes(change)


def lengths(change: Callable[[np.ndarray], object]) -> Callable[[Path], None]:
    return planes(lambda tensors: change(tensors[ROWS].view("<u4")))


def empty(rows: int, columns: int, weights: int) -> Callable[[Path], None]:
    """A tensor of this shape without a byte of records."""

    def change(tensors: Tensors) -> None:
        tensors[META][37:39], tensors[META][3] = (rows, columns), weights
        records = -(-rows * columns // weights)
        tensors[ROWS] = np.zeros(-(-records * 4 // 16) * 16, np.uint8)
        tensors[EMBED] = np.zeros(0, np.uint8)

    return planes(change)


def swapped(tensors: Tensors) -> None:
    """Each version's parameters stand before the other's records."""
    tensors[META], tensors[PRUNED_META] = tensors[PRUNED_META], tensors[META]


def without_last_length(lengths: np.ndarray) -> None:
    lengths[1] += lengths[2]
    lengths[2] = 0


def one_byte_further(lengths: np.ndarray) -> None:
    lengths[0] += 1
    lengths[1] -= 1


WHOLE: dict[str, Case] = {
    "a version to come": Case(parameter((0, 3)), "version 3 of the format"),
    "version 1 of the same": Case(parameter((0, 1)), "is not that of a packed tensor"),
    "version 2 of a pruned tensor": Case(
        planes(lambda tensors: tensors[PRUNED_META].put(0, 2)), "it has fewer than 37 fields"
    ),
    "the parameters of the other version": Case(planes(swapped), "its row table has"),
    "a record of no weights": Case(parameter((3, 0)), "its records have 0 weights"),
    "a record that ends within a row": Case(parameter((3, 16391)), "16391 weights, its rows 12"),
    "a record of 2^40 weights": Case(parameter((3, 12 << 40)), "weights, its rows 12"),
    "tiers below zero": Case(parameter((4, -1)), "its tiers are -1"),
    "a tier of 15 bits": Case(parameter((4, 0x21F)), "each has 1 to 3"),
    "a tier of no bits": Case(parameter((4, 0x201)), "each has 1 to 3"),
    "an exponent twice": Case(listed(1), "different"),
    "an exponent past the list": Case(listed(63, 9), "has bytes set"),
    "an exponent past the last list": Case(listed(255, 9), "has bytes set"),
    "an exponent twice in another list": Case(listed(3 * 64 + 1), "not all the same exponents"),
    "an exponent that another list lacks": Case(listed(64, 9), "not all the same exponents"),
    "exponents that float16 lacks": Case(parameter((1, 2)), "an exponent has 5 bits"),
    "a shape that overflows": Case(parameter((37, 1 << 62)), "rows; emp-llm takes up to"),
    "another shape": Case(parameter((37, 10_000)), "its row table has"),
    "2^36 weights in a few bytes": Case(
        empty(1 << 24, 1 << 12, 1 << 22), "this is not a valid checkpoint"
    ),
    "lengths that overflow": Case(lengths(lambda found: found.fill(0xFFFFFFFF)), "is impossible"),
    "records past the end": Case(
        lengths(lambda found: found.put(2, found[2] + 16)), "its row table describes"
    ),
    "a record of no bytes": Case(
        lengths(without_last_length), "record 1: it is longer or shorter than its codes say"
    ),
    "a byte that goes to another record": Case(
        lengths(one_byte_further), "record 0: it is longer or shorter than its codes say"
    ),
    "padding that is not zero": Case(
        planes(lambda tensors: tensors[ROWS].put(-1, 1)), f"the padding of '{ROWS}' is not zero"
    ),
    "lengths without end": Case(longer(ROWS, 16), "its row table has"),
    "records that are missing": Case(without(EMBED), f"lacks its plane '{EMBED}'"),
    "lengths alone": Case(without(META), "is there without its other planes"),
    "lengths of another dtype": Case(retyped(ROWS, "<i4"), "it must be U8 of one dimension"),
}
