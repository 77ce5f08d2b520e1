"""What a job says of whole records that are held in memory, and where the parts of a record are.

The constants are the places of numbers in a job, see `emp_kernels.cpu.team`; those that a job on
pruned rows has too are in `emp_kernels.cpu.held_job`.

Legend: first and stop are weights, numbered within their record. Of each tier that a part of a
record needs, starts_T says where it starts, from_T which of its codes is the first to be decoded,
to_T which is past the last, and skip_T how many of those at its start no code that is decoded of
the tier before leads to; the item past the last tier is about escapes.
"""

import numba
import numpy as np

from emp_kernels.cpu import held_job as place
from emp_kernels.cpu.bit_steps import LANES
from emp_kernels.cpu.team import array_at
from emp_kernels.cpu.whole_check import count_past
from emp_kernels.whole_layout import MAX_TIERS

__all__ = [
    "CONTEXT_BITS",
    "ESCAPE",
    "ESCAPE_BYTES",
    "EXPONENTS",
    "ORIGIN",
    "PART_BYTES",
    "REACHED",
    "RECORD",
    "SHORT",
    "SIMD",
    "STOP_ROW",
    "TIERS",
    "VALUE_BITS",
    "WIDTHS",
    "find_part",
    "part_arrays",
    "range_of",
    "reached_of",
    "record_bytes",
    "width_of",
]

(
    REACHED,
    RECORD,
    ORIGIN,
    TIERS,
    WIDTHS,
    EXPONENTS,
    SHORT,
    VALUE_BITS,
    CONTEXT_BITS,
    ESCAPE,
    ESCAPE_BYTES,
    SIMD,
    STOP_ROW,
) = range(place.FIRST_ROW + 1, place.FIRST_ROW + 14)
"""`emp_kernels.held.HeldWhole.arguments`, then: whether to use instructions that not every CPU has;
the row past the last one that is to be unpacked."""

_PART_ITEMS = MAX_TIERS + 1
PART_BYTES = 320
"""Bytes that the arrays of a part of a record take."""

_njit = numba.njit(nogil=True, cache=True, error_model="numpy")


@_njit
def record_bytes(job, record):
    """The bytes of a record, and some behind it."""
    at = array_at(job[place.OFFSETS] + 8 * record, 1, np.int64)[0]
    if at >= job[place.TAIL_START]:
        skipped = at - job[place.TAIL_START]
        return array_at(job[place.TAIL] + skipped, job[place.TAIL_SIZE] - skipped, np.uint8)
    return array_at(job[place.PAYLOAD] + at, job[place.PAYLOAD_SIZE] - at, np.uint8)


@_njit
def reached_of(job, record):
    """How many weights of a record get to each tier, and escape."""
    items = job[TIERS] + 1
    return array_at(job[REACHED] + 4 * record * items, items, np.int32)


@_njit
def range_of(job, first_row, stop_row, unit):
    """Which weights of which record are in a range of rows.

    Args:
        job: The job.
        first_row: The range's first row.
        stop_row: The row past its last one.
        unit: The number of a record among those that hold the range.

    Returns:
        (record, first weight, weight past the last).
    """
    size = job[RECORD]
    first = (job[ORIGIN] + first_row) * job[place.COLUMNS]
    stop = (job[ORIGIN] + stop_row) * job[place.COLUMNS]
    record = first // size + unit
    return record, max(first - record * size, 0), min(stop - record * size, size)


@_njit
def part_arrays(own):
    """starts_T, from_T, to_T and skip_T, in scratch."""
    return (
        array_at(own, _PART_ITEMS, np.int64),
        array_at(own + 8 * _PART_ITEMS, _PART_ITEMS, np.int64),
        array_at(own + 16 * _PART_ITEMS, _PART_ITEMS, np.int64),
        array_at(own + 24 * _PART_ITEMS, _PART_ITEMS, np.int64),
    )


@_njit
def find_part(job, data, reached_T, first, stop, part):
    """Find what must be decoded of each tier for some weights of a record.

    Args:
        job: The job.
        data: The record.
        reached_T: How many weights get to each tier.
        first: The first weight.
        stop: The weight past the last.
        part: As from `part_arrays`, written.
    """
    starts_T, from_T, to_T, skip_T = part
    n, value_bits = np.int64(reached_T[0]), job[VALUE_BITS]
    at = n * (value_bits // 8) + value_bits % 8 * ((n + 7) >> 3)
    exact = first // LANES * LANES  # the first code of a weight that is decoded
    for t in range(job[TIERS]):
        n, width = np.int64(reached_T[t]), width_of(job, t)
        stripe = (n + 7) >> 3
        starts_T[t], from_T[t], to_T[t] = at, first // LANES * LANES, stop
        skip_T[t] = first - from_T[t]
        first = count_past(data, at, stripe, width, 0, from_T[t])
        exact = first + count_past(data, at, stripe, width, from_T[t], exact)
        if stop == n:
            stop = np.int64(reached_T[t + 1])
        else:
            stop = first + count_past(data, at, stripe, width, from_T[t], stop)
        at += width * stripe
    starts_T[job[TIERS]], from_T[job[TIERS]] = at, exact


@_njit
def width_of(job, tier):
    """Bits of a tier."""
    return job[WIDTHS] >> (4 * tier) & 15
