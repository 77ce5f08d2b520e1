"""What a job says of packed rows that are held in memory, and of what is to be done with them.

The constants are the places of numbers in a job, see `emp_kernels.cpu.team`.
"""

from emp_kernels.cpu.team import FIRST_FREE

__all__ = [
    "ALIGN",
    "BIAS",
    "BITS",
    "CODE_TABLES",
    "COLUMNS",
    "DIGITS",
    "DIGIT_BITS",
    "DROPPED",
    "ESCAPE_PLACES",
    "ESCAPE_STARTS",
    "FIRST_ROW",
    "MANTISSA",
    "OFFSETS",
    "OUT",
    "PAYLOAD",
    "PAYLOAD_SIZE",
    "PLACE_BYTES",
    "RADIX",
    "ROWS",
    "ROW_LIST",
    "TABLE",
    "TAIL",
    "TAIL_SIZE",
    "TAIL_START",
    "TOKENS",
    "VALUE_TABLES",
    "X",
]

(
    PAYLOAD,
    TABLE,
    OFFSETS,
    ESCAPE_STARTS,
    ESCAPE_PLACES,
    TAIL,
    PAYLOAD_SIZE,
    TAIL_START,
    TAIL_SIZE,
    PLACE_BYTES,
    ROWS,
    COLUMNS,
    BITS,
    MANTISSA,
    DROPPED,
    RADIX,
    DIGITS,
    ALIGN,
    TOKENS,
    X,
    OUT,
    BIAS,
    ROW_LIST,
    FIRST_ROW,
    CODE_TABLES,
    DIGIT_BITS,
    VALUE_TABLES,
) = range(FIRST_FREE, FIRST_FREE + 27)
"""`emp_kernels.held.HeldRows.arguments`, then: tokens; the addresses of activations, of the result
and of the bias, 0 if there is none; for rows that are to be unpacked, the address of their numbers,
or 0 and the first of them; for kernels that decode bytes, the address of
`emp_kernels.cpu.byte_planes.code_tables` and the bits of a digit there; the address of
`emp_kernels.cpu.lanes.value_tables`."""
