"""Checks of arguments before a kernel reads them: kernels themselves check no bounds."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from emp_kernels.errors import DamagedRowError
from emp_kernels.held import HeldRows, HeldWhole
from emp_kernels.layout import RowLayout
from emp_kernels.rows import Bytes, Counts, Given, Patterns, PerRow, Rule, Table, Threshold
from emp_kernels.whole_layout import WholeLayout

__all__ = [
    "check_gathered",
    "check_held",
    "check_kept",
    "check_lengths",
    "check_mask",
    "check_payload",
    "check_product",
    "check_record_sizes",
    "check_size",
    "check_table",
    "check_turned",
    "check_whole",
]


def check_mask(shape: Sequence[int], rule: Rule) -> None:
    """Check that a given mask fits weights of that shape, [R, C]; other rules always do.

    Raises:
        ValueError: If its shape, dtype or memory order is another, or it names columns past C.
    """
    if not isinstance(rule, Given):
        return
    rows, columns = shape
    mask, expected = rule.mask, (rows, -(-columns // 8))
    if mask.shape != expected or mask.dtype != np.uint8 or not mask.flags.c_contiguous:
        raise ValueError(f"the mask is {mask.dtype} {mask.shape}, it must be uint8 {expected}")
    if columns % 8 and (mask[:, -1] >> columns % 8).any():
        raise ValueError(f"the mask names columns past the last of {columns}")


def check_kept(shape: Sequence[int], rule: PerRow | Threshold, kept: Counts | None) -> None:
    """Check the numbers of scores to keep of each row, of scores of that shape, [R, C].

    Raises:
        ValueError: If they come with a threshold, have another shape, or exceed a row.
    """
    rows, columns = shape
    if kept is not None and (
        isinstance(rule, Threshold)
        or kept.shape != (rows,)
        or (kept < 0).any()
        or (kept > columns).any()
    ):
        raise ValueError(f"kept needs PerRow, and must be int64 [{rows}] from 0 to {columns}")


def check_payload(payload: Bytes, table: Table, layout: RowLayout) -> npt.NDArray[np.int64]:
    """Check a row table and that a payload is as long as it says.

    Returns:
        int64 [R, 4], the lengths of each record's sections, see `RowLayout.sections`.

    Raises:
        DamagedRowError: If a line is impossible, or the payload is longer or shorter.
    """
    return check_size(payload.size, table, layout)


def check_size(nbytes: int, table: Table, layout: RowLayout) -> npt.NDArray[np.int64]:
    """As `check_payload`, of records that have so many bytes."""
    check_table(table, layout)
    sections = layout.sections(table[:, 0], table[:, 1])
    if sections.sum() != nbytes:
        raise DamagedRowError(
            max(len(table) - 1, 0),
            f"the row table says {sections.sum()} bytes of records, there are {nbytes}",
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


def check_turned(matrix: Patterns, out: Patterns) -> None:
    """Check that a matrix can be turned into another array.

    Raises:
        ValueError: If the shape or dtype is wrong, or the items of a line do not lie side by side.
    """
    if out.shape != matrix.shape[::-1] or out.dtype != matrix.dtype:
        raise ValueError(
            f"{matrix.dtype} {matrix.shape} is to be turned to {out.dtype} {out.shape}; that must "
            f"be {matrix.dtype} {matrix.shape[::-1]}"
        )
    for array in (matrix, out):
        if not array.flags.c_contiguous and (
            array.strides[1] != array.itemsize
            or array.strides[0] % array.itemsize
            or array.strides[0] < array.shape[1] * array.itemsize
        ):
            raise ValueError(
                f"the items of each line must lie side by side, one line behind the other; strides "
                f"are {array.strides}"
            )


def check_whole(payload: Bytes, lengths: Counts, layout: WholeLayout, out: Patterns) -> None:
    """Check that whole records fit what they are to be decoded to.

    Raises:
        DamagedRowError: If a length is impossible, or they do not add up to the payload.
        ValueError: If the output has another number or dtype of weights, or lies scattered.
    """
    storage = layout.number_format.storage
    if (
        lengths.shape != (layout.records(out.size),)
        or out.dtype != storage
        or not out.flags.c_contiguous
    ):
        raise ValueError(
            f"{lengths.size} records of {layout.weights} weights are to be decoded to {out.dtype} "
            f"{out.shape}; that must be {storage}, C-contiguous, and as many weights"
        )
    check_record_sizes(payload.size, lengths, layout)


def check_lengths(
    payload: Bytes, lengths: Counts, layout: WholeLayout, rows: int, columns: int
) -> None:
    """Check that whole records can be held.

    Raises:
        DamagedRowError: If a length is impossible, or they do not add up to the payload.
        ValueError: If there are records of another number of weights, or the payload lies
            scattered.
    """
    if (
        rows < 0
        or columns < 1
        or layout.weights % columns
        or lengths.shape != (layout.records(rows * columns),)
        or not payload.flags.c_contiguous
    ):
        raise ValueError(
            f"{lengths.size} records of {layout.weights} weights do not hold {rows} rows of "
            f"{columns}, or their bytes do not lie one behind the other"
        )
    check_record_sizes(payload.size, lengths, layout)


def check_record_sizes(nbytes: int, lengths: Counts, layout: WholeLayout) -> None:
    """Check that whole records may have such lengths, and have so many bytes together.

    Raises:
        DamagedRowError: If a length is impossible, or they do not add up.
    """
    bad = (lengths < 0) | (lengths > layout.longest_record)
    if bad.any():
        record = int(np.argmax(bad))
        raise DamagedRowError(record, f"its length, {lengths[record]} bytes, is impossible")
    if lengths.sum() != nbytes:
        raise DamagedRowError(
            max(lengths.size - 1, 0),
            f"the row table says {lengths.sum()} bytes of records, there are {nbytes}",
        )


def check_product(held: HeldRows | HeldWhole, x: Patterns, out: Patterns, bias: Patterns) -> None:
    """Check that arrays fit a product with held rows; a bias without items is none.

    Raises:
        ValueError: If a shape or dtype is wrong, or an array lies scattered.
    """
    columns, storage = held.columns, held.number_format.storage
    shapes = x.shape, out.shape, bias.shape
    if (
        x.ndim != 2
        or x.shape[1] != columns
        or out.shape != (len(x), held.rows)
        or (bias.size and bias.shape != (held.rows,))
    ):
        raise ValueError(
            f"held rows are {(held.rows, columns)}; x, the result and the bias of shapes "
            f"{', '.join(map(str, shapes))} do not fit"
        )
    for array in (x, out, bias):
        if array.dtype != storage or not array.flags.c_contiguous:
            raise ValueError(
                f"x, the result and the bias must be {storage} and C-contiguous; one is "
                f"{array.dtype} with strides {array.strides}"
            )


def check_held(held: HeldRows | HeldWhole, first: int, stop: int, out: Patterns) -> None:
    """Check that there are held rows from `first` to before `stop`, and that they fit an array.

    Raises:
        ValueError: If not, or if the array's dtype is wrong, or it lies scattered.
    """
    if not 0 <= first <= stop <= held.rows:
        raise ValueError(f"rows {first} to {stop} are asked for, there are {held.rows}")
    _check_out(held, stop - first, out)


def check_gathered(held: HeldRows | HeldWhole, rows: Counts, out: Patterns) -> None:
    """Check that there are held rows of these numbers, and that they fit an array.

    Raises:
        IndexError: If there is no such row.
        ValueError: As of `check_held`.
    """
    if rows.dtype != np.int64 or rows.ndim != 1 or not rows.flags.c_contiguous:
        raise ValueError(f"rows are {rows.dtype} {rows.shape}, they must be int64 [N], contiguous")
    if rows.size and (rows.min() < 0 or rows.max() >= held.rows):
        raise IndexError(f"rows must be from 0 to {held.rows - 1}")
    _check_out(held, len(rows), out)


def _check_out(held: HeldRows | HeldWhole, rows: int, out: Patterns) -> None:
    storage, shape = held.number_format.storage, (rows, held.columns)
    if out.shape != shape or out.dtype != storage or not out.flags.c_contiguous:
        raise ValueError(
            f"rows are to be decoded to {out.dtype} {out.shape}; that must be {storage} {shape}, "
            "C-contiguous"
        )
