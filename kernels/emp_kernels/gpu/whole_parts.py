"""Reading whole records: weights that all stay, a tile of a row at a time.

A weight's bits in a tier lie at its rank there: how many weights of its record get to the tier
before it. Ranks at a tile's start are known from the tile before, or from a table made when the
record was checked; within the tile they take one scan a tier. Late tiers have few weights: most
tiles skip them.

Legend as in `emp_kernels.gpu.unpack_parts`. A *nibble field* of a chunk has four bits for each of
its eight columns. Words a and b of a chunk have a byte for each column, a for 0 to 3, b for 4 to 7.
"""

import triton
import triton.language as tl

from emp_kernels.gpu.unpack_parts import (
    choose_bytes,
    integers,
    load_escapes,
    room_behind,
    spread,
    window,
)

__all__ = ["LIST_ROOM", "append", "decode_whole_tile", "read_sections"]

LIST_ROOM = tl.constexpr(64)
"""Bytes of a list: room for the exponents of all tiers, 56 at most, and a place behind them."""


@triton.jit
def append(items, item):
    """A tuple with one more item."""
    one = (item,)
    return items + one


@triton.jit
def read_sections(sections, end, record, TIERS: tl.constexpr):
    """Where the parts of a record lie, and how many words there are behind each start.

    Args:
        sections: Pointer to int64 [records, TIERS + 2]: where values, tiers and escapes start.
        end: Words of the payload.
        record: Which record.
    """
    line = sections + record * (TIERS + 2)
    at = ()
    room = ()
    for t in tl.static_range(TIERS + 2):
        start = tl.load(line + t)
        at = append(at, start)
        room = append(room, room_behind(end, start))
    return at, room


@triton.jit
def _codes(words, at, room, stripe, rank_N, some_N, WIDTH: tl.constexpr):
    """The next eight codes of a tier from each rank on, as a nibble field."""
    field_N = (rank_N * 0).to(tl.uint32)
    for bit in tl.static_range(WIDTH):
        bits_N = integers(words, room, at, rank_N + bit * stripe * 8, some_N, 1, 1)
        field_N |= spread(bits_N & 255) << bit
    return field_N


@triton.jit
def _to_columns(field_N, bits_N, sums_N):
    """Move codes, a nibble field in the tier's order, to the bytes of their columns: words a, b.

    Args:
        field_N: Codes.
        bits_N: Nibble field, 1 for each column that gets to the tier.
        sums_N: Its sums: how many get there up to each column.
    """
    even_N, odd_N = field_N & 0x0F0F0F0F, (field_N >> 4) & 0x0F0F0F0F
    before_N = sums_N << 4
    # of the bytes of these two words, code j is byte j / 2 of the first or of the second
    selector_N = ((before_N >> 1) & 0x33333333) | ((before_N & 0x11111111) << 2)
    all_or_none_N = bits_N * 0 + 0xFF00
    keep_a = choose_bytes(all_or_none_N, all_or_none_N, bits_N)
    keep_b = choose_bytes(all_or_none_N, all_or_none_N, bits_N >> 16)
    code_a = choose_bytes(even_N, odd_N, selector_N) & keep_a
    return code_a, choose_bytes(even_N, odd_N, selector_N >> 16) & keep_b


@triton.jit
def _past(code_a, code_b, WIDTH: tl.constexpr):
    """Which codes have all bits set, as a nibble field."""
    all_a, all_b = code_a, code_b
    for bit in tl.static_range(1, WIDTH):
        all_a &= code_a >> bit
        all_b &= code_b >> bit
    return _nibbles(all_a) | (_nibbles(all_b) << 16)


@triton.jit
def _nibbles(word):
    """The lowest bit of each byte of a word, in the lowest of four bits each."""
    pairs = word & 0x01010101
    pairs = (pairs | (pairs >> 4)) & 0x00110011
    return (pairs | (pairs >> 8)) & 0x1111


@triton.jit
def _values(words, at, room, weights, index_N, some_N, VALUE_BITS: tl.constexpr):
    """The values of each chunk's weights, uint32 [8, N]."""
    column_8N = tl.arange(0, 8)[:, None]
    value_8N = (index_N[None, :] * 0 + column_8N * 0).to(tl.uint32)
    for i in tl.static_range(VALUE_BITS // 8):
        bytes_N = window(words, room, at, index_N + i * weights, some_N, 1)
        byte_8N = (bytes_N[None, :] >> (column_8N * 8).to(tl.uint64)).to(tl.uint32) & 255
        value_8N |= byte_8N << (8 * i)
    stripe = (weights + 7) // 8
    for bit in tl.static_range(VALUE_BITS // 8 * 8, VALUE_BITS):
        before = weights * (VALUE_BITS // 8) + (bit - VALUE_BITS // 8 * 8) * stripe
        bits_N = integers(words, room, at, index_N + before * 8, some_N, 1, 1)
        value_8N |= ((bits_N[None, :] >> column_8N.to(tl.uint32)) & 1) << bit
    return value_8N


@triton.jit
def decode_whole_tile(
    payload,
    words,
    lists,
    at,
    room,
    weights,
    index,
    columns,
    ranks,
    WIDTHS: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    DROPPED: tl.constexpr,
    CONTEXT: tl.constexpr,
    ESCAPE_BYTES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Decode the next tile of a row.

    Args:
        payload: Pointer to the records, uint8.
        words: The same, int32.
        lists: Pointer to uint8 [contexts, LIST_ROOM], the exponents by context and symbol, and 0
            for the symbol of weights that escape.
        at: What `read_sections` gives.
        room: The same.
        weights: Of the record.
        index: Number of the tile's first weight in its record.
        columns: Of the row, from there on; TILE at most are decoded.
        ranks: How many weights of the record get to each tier but the first before the tile, and
            how many of them escape.

    Returns:
        (patterns, uint32 [8, N], ranks for the next tile).
    """
    N: tl.constexpr = TILE // 8
    TIERS: tl.constexpr = len(WIDTHS)
    STORED: tl.constexpr = MANTISSA - DROPPED
    chunk_N = tl.arange(0, N)
    index_N = index + chunk_N * 8
    inside_N = tl.minimum(tl.maximum(columns - chunk_N * 8, 0), 8)
    bits_N = spread(((1 << inside_N) - 1).to(tl.uint32))
    some_N = bits_N != 0
    value_8N = _values(words, at[0], room[0], weights, index_N, some_N, 1 + STORED)

    rank_N = index_N
    symbol_a = bits_N * 0
    symbol_b = bits_N * 0
    new_ranks = ()
    anyone = weights
    for t in tl.static_range(TIERS):
        past_N = bits_N * 0
        if anyone > 0:
            stripe = ((at[t + 2] - at[t + 1]) // WIDTHS[t]).to(tl.int32)
            sums_N = bits_N * 0x11111111
            codes_N = _codes(words, at[t + 1], room[t + 1], stripe, rank_N, bits_N != 0, WIDTHS[t])
            code_a, code_b = _to_columns(codes_N, bits_N, sums_N)
            symbol_a += code_a
            symbol_b += code_b
            past_N = _past(code_a, code_b, WIDTHS[t])
        bits_N = past_N
        count_N = ((bits_N * 0x11111111) >> 28).to(tl.int32)
        anyone = tl.sum(count_N, 0)
        rank_N = ranks[t] + tl.cumsum(count_N, 0) - count_N
        new_ranks = append(new_ranks, ranks[t] + anyone)

    column_8N = tl.arange(0, 8)[:, None]
    symbols_8N = tl.where(column_8N < 4, symbol_a[None, :], symbol_b[None, :])
    symbol_8N = (symbols_8N >> ((column_8N & 3) * 8).to(tl.uint32)) & 255
    low_8N = value_8N & ((1 << STORED) - 1)
    context_8N = low_8N >> (STORED - CONTEXT)
    exponent_8N = tl.load(lists + (context_8N * LIST_ROOM + symbol_8N)).to(tl.uint32)
    weight_8N = (low_8N << DROPPED) | (exponent_8N << MANTISSA)
    weight_8N |= (value_8N >> STORED) << (BITS - 1)

    if anyone > 0:
        bit_8N = (1 << (column_8N * 4)).to(tl.uint32)
        left_N = bits_N
        nth_N = rank_N
        for _ in range(tl.max(((bits_N * 0x11111111) >> 28).to(tl.int32), 0)):
            first_N = left_N & (0 - left_N)
            item_N = load_escapes(payload, at[TIERS + 1], nth_N, left_N != 0, ESCAPE_BYTES)
            lost_N = item_N & ((1 << DROPPED) - 1)
            extra_N = ((item_N >> DROPPED) << MANTISSA) | lost_N
            here_8N = (first_N[None, :] == bit_8N) & (left_N != 0)[None, :]
            weight_8N |= tl.where(here_8N, extra_N[None, :], 0)
            left_N ^= first_N
            nth_N += 1
    return weight_8N, new_ranks
