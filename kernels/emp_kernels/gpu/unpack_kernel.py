"""The kernel that unpacks rows of any layout; all that a record says is checked on the way.

A program unpacks a row, tile by tile. A weight's place in the record depends on how many are kept
before it, which is a scan over the tile's mask. Nothing that a damaged record says makes a program
read or write outside of its row and the payload.

Legend as in `emp_kernels.gpu.unpack_parts`.
"""

import triton
import triton.language as tl

from emp_kernels.gpu.unpack_parts import (
    choose_row,
    integers,
    load_escapes,
    next_place,
    read_bits,
    read_record,
    window,
)

__all__ = ["decode_tile", "unpack_row"]


@triton.jit
def _before(sums, column):
    """How many of a chunk are kept before a column, times eight.

    `sums` has, four bits for each column, how many are kept up to and with it. Times eight, it is
    the shift that moves the column's byte of eight to the front.
    """
    shift = tl.maximum(column * 4 - 7, 0).to(tl.uint32)
    kept = tl.where(column == 0, 0, 0x78).to(tl.uint32)
    return tl.where(column == 1, sums << 3, sums >> shift) & kept


@triton.jit
def _digit(byte, place, RADIX: tl.constexpr, DIGIT_BITS: tl.constexpr):
    """Digit t of a byte, uint32, to the base RADIX.

    The place of powers of two is the digit's first bit. Of others it is ⌈2²⁴ / radixᵗ⁺¹⌉: modulo
    2²⁴ the product with the byte is the fraction of byte / radixᵗ⁺¹, 255 too large at most, where
    fractions are a 256th of 2²⁴ apart at least; times RADIX, its whole part is the digit.
    """
    return (
        (byte >> place) & (RADIX - 1) if DIGIT_BITS > 0 else (byte * place & 0xFFFFFF) * RADIX >> 24
    )


@triton.jit
def decode_tile(
    payload,
    words,
    record,
    start,
    columns,
    named,
    marked,
    turn,
    turned,
    place,
    largest_N,
    CHECKED: tl.constexpr,
    BITS: tl.constexpr,
    DROPPED: tl.constexpr,
    STORED: tl.constexpr,
    RADIX: tl.constexpr,
    DIGITS: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
):
    """Decode the next tile of a row.

    Args:
        payload: Pointer to the records, uint8.
        words: The same, int32.
        record: What `read_record` gives.
        start: The tile's first column.
        columns: Columns of the row.
        named: Columns that the mask has named before the tile.
        marked: Escapes before it.
        turn: From rank `turned` on, codes are digit `turn` of byte after byte. After the last byte,
            the next digit of the first one follows. Most tiles lie within one digit.
        turned: See there.
        place: Of the digit, see `next_place`.
        largest_N: The largest keys that may reach infinity, [N].
        CHECKED: Whether to look for these.

    Returns:
        (patterns, uint32 [8, N], then named, marked, turn, turned, place, largest_N for the next
        tile).
    """
    N: tl.constexpr = TILE // 8
    LIMIT: tl.constexpr = (RADIX << STORED) - 1  # the largest distance there can be: an escape's
    KEY_MASK: tl.constexpr = (1 << (BITS - 1)) - 1
    k, escaped, base, sections, masked, room, code_bytes = record
    mask_at, values_at, codes_at, escapes_at = sections
    values_room, codes_room = room
    column_8N = tl.arange(0, 8)[:, None]
    bit_8N = (1 << (column_8N * 4)).to(tl.uint32)
    bits_N, sums_N, rank_N, named = read_bits(
        payload + mask_at, start, k, masked, columns, named, N
    )
    some_N = bits_N != 0

    before_8N = _before(sums_N[None, :], column_8N)
    if STORED == 7:
        bytes_N = window(words, values_room, values_at, rank_N, some_N, ALIGN)
        value_8N = (bytes_N[None, :] >> before_8N.to(tl.uint64)).to(tl.uint32)
    else:
        rank_8N = rank_N[None, :] + (before_8N >> 3).to(tl.int32)
        some_8N = some_N[None, :]
        value_8N = integers(words, values_room, values_at, rank_8N, some_8N, STORED + 1, ALIGN)
    away_8N = value_8N & ((1 << STORED) - 1)
    if DIGITS > 0:
        if (named <= turned + code_bytes) | (turn == DIGITS - 1):
            bytes_N = window(words, codes_room, codes_at, rank_N - turned, some_N, ALIGN)
            byte_8N = (bytes_N[None, :] >> before_8N.to(tl.uint64)).to(tl.uint32) & 255
            code_8N = _digit(byte_8N, place, RADIX, DIGIT_BITS)
        else:
            rank_8N = rank_N[None, :] + (before_8N >> 3).to(tl.int32)
            turned_8N = rank_8N * 0 + turned
            place_8N = (rank_8N * 0).to(tl.uint32) + place
            while (turn < DIGITS - 1) & (turned + code_bytes < named):
                turn += 1
                turned += code_bytes
                place = next_place(place, RADIX, DIGIT_BITS)
                above_8N = rank_8N >= turned
                turned_8N = tl.where(above_8N, turned, turned_8N)
                place_8N = tl.where(above_8N, place, place_8N)
            at_8N = codes_at + (rank_8N - turned_8N)
            byte_8N = tl.load(payload + at_8N, mask=some_N[None, :]).to(tl.uint32)
            code_8N = _digit(byte_8N, place_8N, RADIX, DIGIT_BITS)
        away_8N += code_8N << STORED
    key_8N = (base + away_8N) << DROPPED
    keep_8N = (bits_N[None, :] & bit_8N) != 0
    if CHECKED:
        # few rows of a sound model hold weights so large: the others need no look at each key
        if base + LIMIT > ((KEY_MASK >> STORED >> DROPPED) << STORED):
            in_window_8N = tl.where(keep_8N & (away_8N != LIMIT), key_8N, 0)
            largest_N = tl.maximum(largest_N, tl.max(in_window_8N, 0))
    weight_8N = tl.where(keep_8N, key_8N | ((value_8N >> STORED) << (BITS - 1)), 0)

    # A column that goes may look like an escape too: it was given what the next one that stays
    # has. The bits of the mask sort these out, in the rare tiles that come here at all.
    if tl.max(tl.max(away_8N, 0), 0) == LIMIT:
        left_N = tl.sum(tl.where(away_8N == LIMIT, bit_8N & bits_N[None, :], 0), 0)
        count_N = ((left_N * 0x11111111) >> 28).to(tl.int32)
        nth_N = marked + tl.cumsum(count_N, 0) - count_N
        marked += tl.sum(count_N, 0)
        for _ in range(tl.max(count_N, 0)):  # each chunk's first escape, then its second, ...
            first_N = left_N & (0 - left_N)
            stored_N = (left_N != 0) & (nth_N < escaped)
            whole_N = load_escapes(payload, escapes_at, nth_N, stored_N, BITS // 8)
            if CHECKED:
                largest_N = tl.maximum(largest_N, whole_N & KEY_MASK)
            weight_8N = tl.where(first_N[None, :] == bit_8N, whole_N[None, :], weight_8N)
            left_N ^= first_N
            nth_N += 1
    return weight_8N, named, marked, turn, turned, place, largest_N


@triton.jit
def unpack_row(
    payload,
    words,
    end,
    lines,
    chosen,
    rows,
    out,
    starts,
    faults,
    columns,
    row_stride,
    BITS: tl.constexpr,
    DROPPED: tl.constexpr,
    STORED: tl.constexpr,
    RADIX: tl.constexpr,
    DIGITS: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
    LOWEST: tl.constexpr,
    ALIGN: tl.constexpr,
    PART: tl.constexpr,
    TILE: tl.constexpr,
):
    """Decode the record of the program's row.

    Args:
        payload: Pointer to the records, uint8.
        words: The same, int32.
        end: How many words there are; None if 32 bytes more than the records take may be read.
        lines: Pointer to the row's lines, int64 [rows, LINE].
        chosen: See `choose_row`; of a row that is not there, all weights are NaN.
        rows: Of the records.
        out: Pointer to the weights, int16 or int32; None if they are checked only.
        starts: None, or pointer to int32 [rows, parts, 2], written: how many weights of a row are
            kept before each part of PART columns, and how many of them escape.
        faults: None, or pointer to uint8 [rows], written: 0 if nothing contradicts a row's line.
    """
    N: tl.constexpr = TILE // 8
    INFINITY: tl.constexpr = ((1 << (BITS - 1)) - 1) >> STORED >> DROPPED << STORED << DROPPED
    out_row = tl.program_id(0).to(tl.int64)
    row, there = choose_row(chosen, out_row, rows)
    record, bad = read_record(payload, end, lines, row, columns, DIGITS, ALIGN)
    k = record[0]
    escaped = record[1]
    chunk_N = tl.arange(0, N)
    named = k * 0
    marked = k * 0
    turn = k * 0
    turned = k * 0
    place = record[2] * 0 + LOWEST
    largest_N = tl.zeros([N], tl.uint32)
    for start in range(0, columns, TILE):
        if starts is not None:
            if start % PART == 0:
                part = starts + (row * tl.cdiv(columns, PART) + start // PART) * 2
                tl.store(part, named)
                tl.store(part + 1, marked)
        weight_8N, named, marked, turn, turned, place, largest_N = decode_tile(
            payload,
            words,
            record,
            start,
            columns,
            named,
            marked,
            turn,
            turned,
            place,
            largest_N,
            faults is not None,
            BITS,
            DROPPED,
            STORED,
            RADIX,
            DIGITS,
            DIGIT_BITS,
            ALIGN,
            TILE,
        )
        if out is not None:
            column_N8 = start + chunk_N[:, None] * 8 + tl.arange(0, 8)[None, :]
            there_N8 = out + out_row * row_stride + column_N8
            weight_N8 = tl.trans(weight_8N.to(out.dtype.element_ty))
            if chosen is not None:
                weight_N8 = tl.where(there, weight_N8, -1)
            tl.store(there_N8, weight_N8, mask=column_N8 < columns)
    if faults is not None:
        bad |= (named != k) | (marked != escaped) | (tl.max(largest_N, 0) >= INFINITY)
        tl.store(faults + row, bad.to(tl.uint8))
