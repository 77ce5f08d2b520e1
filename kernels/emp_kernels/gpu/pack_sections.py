"""The sections of a packed record, written on a device from what a row was compressed to.

An item, uint16 or uint32, is a kept weight's value of WIDTH bits, with its code above that.

Each section is written in order, neighbouring threads next to each other, from items that are
gathered: what is read comes from the caches, what is written goes to memory in whole lines.
"""

import triton
import triton.language as tl

__all__ = ["write_codes", "write_escapes", "write_mask", "write_values"]


@triton.jit
def write_mask(mask_ptr, out_ptr, length, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """Write a row's mask, and zeros up to the section's end."""
    for start in range(0, length, TILE):
        byte_T = start + tl.arange(0, TILE)
        bits_T = tl.load(mask_ptr + byte_T, mask=byte_T < (COLUMNS + 7) // 8, other=0)
        tl.store(out_ptr + byte_T, bits_T, mask=byte_T < length)


@triton.jit
def write_values(
    item_ptr,
    out_ptr,
    length,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write WIDTH bits of each kept weight, and zeros up to the section's end.

    A thread writes a unit of UNIT bits at a time, as large as the alignment allows, put together
    from the COUNT items that it may hold parts of: so no two threads write to one byte. Items past
    the last one are zeros.
    """
    BYTES: tl.constexpr = 1 if WIDTH == 8 or ALIGN == 1 else (2 if ALIGN == 2 else 4)
    UNIT: tl.constexpr = 8 * BYTES
    WHOLE: tl.constexpr = UNIT % WIDTH == 0
    COUNT: tl.constexpr = UNIT // WIDTH if WHOLE else (UNIT + 2 * WIDTH - 2) // WIDTH
    WORD: tl.constexpr = tl.uint32 if WHOLE else tl.uint64
    unit_ptr = out_ptr.to(
        tl.pointer_type(tl.uint8 if BYTES == 1 else (tl.uint16 if BYTES == 2 else tl.uint32))
    )
    for start in range(0, length // BYTES, TILE):
        unit_T = start + tl.arange(0, TILE)
        there_T = unit_T < length // BYTES
        past_T = unit_T % WIDTH * UNIT  # bits; WIDTH units are UNIT items
        first_T = unit_T * COUNT if WHOLE else unit_T // WIDTH * UNIT + past_T // WIDTH
        bits_T = tl.zeros([TILE], WORD)
        for i in tl.static_range(COUNT):
            item_T = tl.load(item_ptr + first_T + i, mask=there_T, other=0)
            bits_T |= (item_T & ((1 << WIDTH) - 1)).to(WORD) << (i * WIDTH)
        if not WHOLE:
            bits_T = bits_T >> (past_T % WIDTH).to(WORD)
        tl.store(unit_ptr + unit_T, bits_T.to(unit_ptr.dtype.element_ty), mask=there_T)


@triton.jit
def write_codes(
    item_ptr,
    out_ptr,
    k,
    length,
    WIDTH: tl.constexpr,
    RADIX: tl.constexpr,
    DIGITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the codes: byte i holds digits of weights i, i + m, i + 2m, ...; then zeros to the end.

    Where values are whole bytes, a code is a byte of its item, and is loaded as such.
    """
    IN_A_BYTE: tl.constexpr = WIDTH % 8 == 0
    STEP: tl.constexpr = item_ptr.dtype.element_ty.primitive_bitwidth // 8 if IN_A_BYTE else 1
    code_ptr = item_ptr
    if IN_A_BYTE:
        code_ptr = item_ptr.to(tl.pointer_type(tl.uint8)) + WIDTH // 8
    m = (k + DIGITS - 1) // DIGITS
    for start in range(0, length, TILE):
        byte_T = tl.arange(0, TILE)
        sum_T = tl.zeros([TILE], tl.uint32)
        for digit in tl.static_range(DIGITS):
            first_ptr = code_ptr + (digit * m + start) * STEP
            code_T = tl.load(first_ptr + byte_T * STEP).to(tl.uint32)
            sum_T += (code_T if IN_A_BYTE else code_T >> WIDTH) * RADIX**digit
        sum_T = tl.where(byte_T < m - start, sum_T, 0).to(tl.uint8)
        tl.store(out_ptr + start + byte_T, sum_T, mask=byte_T < length - start)


@triton.jit
def write_escapes(
    row_ptr,
    escape_ptr,
    out_ptr,
    escaped,
    length,
    ITEM: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the whole weights that escape, ITEM bytes each, and zeros up to the section's end."""
    UNIT: tl.constexpr = ITEM if ALIGN % ITEM == 0 else 1
    weight_ptr = row_ptr if ITEM == UNIT else row_ptr.to(tl.pointer_type(tl.uint8))
    unit_ptr = out_ptr.to(tl.pointer_type(weight_ptr.dtype.element_ty))
    UNITS: tl.constexpr = ITEM // UNIT
    for start in range(0, length // UNIT, TILE):
        unit_T = start + tl.arange(0, TILE)
        there_T = unit_T < escaped * UNITS
        column_T = tl.load(escape_ptr + unit_T // UNITS, mask=there_T, other=0)
        at_T = weight_ptr + column_T.to(tl.int64) * UNITS + unit_T % UNITS
        bits_T = tl.load(at_T, mask=there_T, other=0)
        tl.store(unit_ptr + unit_T, bits_T, mask=unit_T < length // UNIT)
