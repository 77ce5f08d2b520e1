"""What is checked of arguments before a kernel sees them, for kernels read them without a look."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from emp_kernels.errors import DamagedRowError
from emp_kernels.layout import RowLayout
from emp_kernels.rows import Bytes, Given, Rule, Table

__all__ = ["check_mask", "check_payload", "check_table"]


def check_mask(shape: Sequence[int], rule: Rule) -> None:
    """See that a given mask is one of these weights: kernels read it without a look.

    Raises:
        ValueError: If its shape, dtype or order is another, or it names columns past the last.
    """
    if not isinstance(rule, Given):
        return
    rows, columns = shape
    mask, expected = rule.mask, (rows, -(-columns // 8))
    if mask.shape != expected or mask.dtype != np.uint8 or not mask.flags.c_contiguous:
        raise ValueError(f"the mask is {mask.dtype} {mask.shape}, it must be uint8 {expected}")
    if columns % 8 and (mask[:, -1] >> columns % 8).any():
        raise ValueError(f"the mask names columns past the last of {columns}")


def check_payload(payload: Bytes, table: Table, layout: RowLayout) -> npt.NDArray[np.int64]:
    """See that a table is one, and of that payload; returns the lengths of its sections.

    Raises:
        DamagedRowError: If it is not.
    """
    check_table(table, layout)
    sections = layout.sections(table[:, 0], table[:, 1])
    if sections.sum() != payload.size:
        raise DamagedRowError(
            max(len(table) - 1, 0),
            f"the table tells of {sections.sum()} bytes, there are {payload.size}",
        )
    return sections


def check_table(table: Table, layout: RowLayout) -> None:
    """Check that each line of a row table, int64 [R, 3], is one that a row can have.

    Raises:
        DamagedRowError: If one is not.
    """
    kept, escaped, base = table[:, 0], table[:, 1], table[:, 2]
    bad = (kept < 0) | (kept > layout.columns) | (escaped < 0) | (escaped > kept)
    bad |= (base < 0) | (base > layout.number_format.key_mask >> layout.dropped_bits)
    if bad.any():
        row = int(np.argmax(bad))
        raise DamagedRowError(
            row,
            f"its table line (kept, escaped, base) = {tuple(table[row].tolist())} is impossible",
        )
