"""The way in for packed weights that stay in memory: hold them, multiply them, unpack rows of them.

As `emp_kernels.dispatch` does for row blocks, every function here checks its arguments, picks a
backend and calls it. "simd" uses AVX-512 where the CPU has it.
"""

from functools import cache

from emp_kernels.checks import (
    check_gathered,
    check_held,
    check_lengths,
    check_payload,
    check_product,
)
from emp_kernels.dispatch import Impl, get_backend
from emp_kernels.held import HeldRows, HeldWhole
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import BF16, NumberFormat
from emp_kernels.rows import Bytes, Counts, Patterns, Table, Workspace
from emp_kernels.whole_layout import WholeLayout

__all__ = [
    "gather_rows",
    "gather_whole",
    "has_fast_products",
    "hold_rows",
    "hold_whole",
    "multiply_rows",
    "multiply_whole",
    "unpack_held_rows",
    "unpack_held_whole",
]


_backend = cache(get_backend)
"""Products need no workspace, so all threads share one backend, and no time goes to making it."""


def has_fast_products(number_format: NumberFormat) -> bool:
    """Whether this CPU has the instructions of the fastest products with such weights."""
    # imported when it is first needed, as backends are
    from emp_kernels.cpu.avx512 import HAS_BF16, HAS_VBMI2

    return HAS_BF16 if number_format is BF16 else HAS_VBMI2


def hold_rows(
    payload: Bytes,
    table: Table,
    layout: RowLayout,
    *,
    impl: Impl = "auto",
    workspace: Workspace | None = None,
) -> HeldRows:
    """Check packed rows in full, as `unpack_rows` does, so that they can be multiplied as they lie.

    Args:
        payload: uint8 [bytes], C-contiguous, the rows' records, one after the other, and nothing
            else: the result refers to this array.
        table: int64 [R, 3], their lines of the row table.
        layout: The tensor's layout.
        impl: Backend; "triton" runs on the CPU.
        workspace: Buffers to use again.

    Raises:
        DamagedRowError: If a record contradicts its line of the table or itself.
        ValueError: If the payload lies scattered.
    """
    if not payload.flags.c_contiguous:
        raise ValueError("packed rows can be held only where their bytes lie one behind the other")
    sections = check_payload(payload, table, layout)
    return get_backend(impl, workspace).hold_rows(payload, sections, table, layout)


def multiply_rows(
    held: HeldRows,
    x: Patterns,
    out: Patterns,
    bias: Patterns | None = None,
    threads: int | None = None,
    *,
    impl: Impl = "auto",
) -> None:
    """Multiply the activations of a few tokens by packed rows: out = x · Wᵀ + bias.

    Each row is decoded once for all tokens. For more than about 16 it is better to unpack rows and
    to multiply these. All numbers have the rows' format. Where a result exceeds it, it is infinite.

    Sums are rounded to the format once, at the end, to the nearest number. "reference" adds in
    float64. The others add in float32, in an order that depends on C and T alone: before it is
    rounded, a sum is off by γ · (Σ|w||x| + |bias|) at most, where γ = n·2⁻²⁴ / (1 − n·2⁻²⁴) and
    n = C + 1. For bf16 "simd" takes subnormal weights, activations and sums for zero where the CPU
    has AVX-512 BF16. How many threads run makes no difference to the bits.

    Args:
        held: R rows of C weights.
        x: uint16 or uint32 [T, C], bit patterns, C-contiguous.
        out: As many [T, R], C-contiguous, written.
        bias: As many [R], C-contiguous.
        threads: How many threads to use at most; as many as torch does if None.
        impl: Backend; "triton" runs on the CPU.

    Raises:
        ValueError: If shapes or dtypes do not fit, or arrays lie scattered.
    """
    bias = out.reshape(-1)[:0] if bias is None else bias
    check_product(held, x, out, bias)
    _backend(impl).multiply_rows(held, x, out, bias, threads)


def unpack_held_rows(
    held: HeldRows,
    first: int,
    stop: int,
    out: Patterns,
    threads: int | None = None,
    *,
    impl: Impl = "auto",
) -> None:
    """Decode some consecutive rows; nothing is checked again.

    Args:
        held: R rows of C weights.
        first: The first row.
        stop: The row past the last one, at most R.
        out: uint16 or uint32 [stop − first, C], C-contiguous, bit patterns, written.
        threads: As for `multiply_rows`.
        impl: Backend; "triton" runs on the CPU.

    Raises:
        ValueError: If there are no such rows, or the output does not fit.
    """
    check_held(held, first, stop, out)
    _backend(impl).unpack_held_rows(held, first, out, threads)


def gather_rows(
    held: HeldRows,
    rows: Counts,
    out: Patterns,
    threads: int | None = None,
    *,
    impl: Impl = "auto",
) -> None:
    """Decode the rows that are asked for, in any order, some maybe more than once.

    Args:
        held: R rows of C weights.
        rows: int64 [N], C-contiguous, their numbers.
        out: uint16 or uint32 [N, C], C-contiguous, bit patterns, written.
        threads: As for `multiply_rows`.
        impl: Backend; "triton" runs on the CPU.

    Raises:
        IndexError: If there is no such row.
        ValueError: If arrays do not fit.
    """
    check_gathered(held, rows, out)
    _backend(impl).gather_rows(held, rows, out, threads)


def hold_whole(
    payload: Bytes,
    lengths: Counts,
    layout: WholeLayout,
    rows: int,
    columns: int,
    *,
    impl: Impl = "auto",
    workspace: Workspace | None = None,
) -> HeldWhole:
    """Check whole records in full, as `unpack_whole` does, so that they can be multiplied.

    Args:
        payload: uint8 [bytes], C-contiguous, the records, one after the other, and nothing else:
            the result refers to this array.
        lengths: int64 [records], bytes of each.
        layout: The tensor's layout.
        rows: Rows of the tensor, R.
        columns: Weights of a row, C; a record has whole rows.
        impl: As for `hold_rows`.
        workspace: The same.

    Raises:
        DamagedRowError: If a record contradicts its length or itself; its row is the record.
        ValueError: If the payload lies scattered, or there must be other records.
    """
    check_lengths(payload, lengths, layout, rows, columns)
    return get_backend(impl, workspace).hold_whole(payload, lengths, layout, rows, columns)


def multiply_whole(
    held: HeldWhole,
    x: Patterns,
    out: Patterns,
    bias: Patterns | None = None,
    threads: int | None = None,
    *,
    impl: Impl = "auto",
) -> None:
    """Multiply the activations of a few tokens by rows that all stay; see `multiply_rows`.

    The bound on sums is the same, and the order of float32 sums depends on C and on whether there
    is one token or more. Infinite weights and NaN give what they give in any product.

    Raises:
        ValueError: If shapes or dtypes do not fit, or arrays lie scattered.
    """
    bias = out.reshape(-1)[:0] if bias is None else bias
    check_product(held, x, out, bias)
    _backend(impl).multiply_whole(held, x, out, bias, threads)


def unpack_held_whole(
    held: HeldWhole,
    first: int,
    stop: int,
    out: Patterns,
    threads: int | None = None,
    *,
    impl: Impl = "auto",
) -> None:
    """Decode some consecutive rows; see `unpack_held_rows`.

    Raises:
        ValueError: If there are no such rows, or the output does not fit.
    """
    check_held(held, first, stop, out)
    _backend(impl).unpack_held_whole(held, first, out, threads)


def gather_whole(
    held: HeldWhole,
    rows: Counts,
    out: Patterns,
    threads: int | None = None,
    *,
    impl: Impl = "auto",
) -> None:
    """Decode the rows that are asked for; see `gather_rows`.

    Of a record no more is decoded than its part with the row, but all codes before it are counted.

    Raises:
        IndexError: If there is no such row.
        ValueError: If arrays do not fit.
    """
    check_gathered(held, rows, out)
    _backend(impl).gather_whole(held, rows, out, threads)
