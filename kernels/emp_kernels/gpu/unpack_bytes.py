"""The kernel that unpacks 16-bit weights whose values are bytes: four weights at a time.

That is bf16 with its whole mantissa, the layout of most models: sign and 7 bits are a byte, and so
is a code. `unpack_kernel` takes 32 bits of a register for each weight. Here all arithmetic is on
words of four bytes, in such a way that no byte carries into the next one.

Legend as in `emp_kernels.gpu.unpack_parts`. A word is four bytes, one for each of four columns: of
a chunk, a is columns 0 to 3 and b columns 4 to 7.
"""

import triton
import triton.language as tl

from emp_kernels.gpu.unpack_parts import (
    choose_bytes,
    choose_row,
    load_escapes,
    next_place,
    read_bits,
    read_record,
    window,
)

__all__ = ["decode_bytes_tile", "unpack_bytes_row"]

_EACH = tl.constexpr(0x01010101)
"""One in each byte of a word."""

_SIGNS = tl.constexpr(0x80808080)
_OTHERS = tl.constexpr(0x7F7F7F7F)


@triton.jit
def _spread_out(bytes_N, before_N):
    """Move eight bytes, uint64 in the record's order, to the words a and b of their columns.

    The sums of the mask, four bits a column, are just what `choose_bytes` takes as a selector.
    """
    low, high = bytes_N.to(tl.uint32), (bytes_N >> 32).to(tl.uint32)
    return choose_bytes(low, high, before_N), choose_bytes(low, high, before_N >> 16)


@triton.jit
def _digits(code, place, RADIX: tl.constexpr, DIGIT_BITS: tl.constexpr):
    """Digit t of each byte of a word to the base RADIX.

    The place of powers of two is the digit's first bit. Of others it is ⌈2¹⁶ / radixᵗ⁺¹⌉, and the
    division is a multiplication by it, of two bytes at a time: two bytes that lie 16 bits apart
    times this are, modulo 2¹⁶ each, the fractions of byte / radixᵗ⁺¹. The upper one is too large by
    the whole part of the lower, and both by the rounding of the place and what is added so that the
    shift to the right cannot make them too small: together less than the 2¹⁶ / radixᵗ⁺¹ that
    fractions are apart. Times RADIX, their whole part is the digit.
    """
    if DIGIT_BITS > 0:
        digits = (code >> place) & ((RADIX - 1) * _EACH)
    else:
        WIDTH: tl.constexpr = 2 if RADIX == 3 else 3  # of a digit
        FRACTIONS: tl.constexpr = (0xFFFF >> WIDTH) * 0x00010001
        ONES: tl.constexpr = (1 << WIDTH) * 0x00010001
        DIGIT: tl.constexpr = ((1 << WIDTH) - 1) * 0x00010001
        even = (code & 0x00FF00FF) * place + ONES
        odd = ((code >> 8) & 0x00FF00FF) * place + ONES
        even = ((even >> WIDTH) & FRACTIONS) * RADIX
        odd = ((odd >> WIDTH) & FRACTIONS) * RADIX
        digits = ((even >> (16 - WIDTH)) & DIGIT) | ((odd >> (8 - WIDTH)) & (DIGIT << 8))
    return digits


@triton.jit
def _first_bytes(count_N):
    """All bits of the first so many of eight bytes, 0 to 8."""
    half_N = (count_N * 4).to(tl.uint64)  # two shifts, for one by 64 is undefined
    return ((half_N * 0 + 1) << half_N << half_N) - 1


@triton.jit
def _weights(value, digits, keep, base, DROPPED: tl.constexpr):
    """The lower and the upper bytes of four weights, in the record's order; no sum passes 255."""
    sums = (value & _OTHERS) + (base & 127) * _EACH
    exponents = digits + ((sums >> 7) & _EACH) + (base >> 7) * _EACH
    low = (sums & _OTHERS) | ((exponents << 7) & _SIGNS)
    high = (exponents >> 1) & _OTHERS
    if DROPPED > 0:
        LEFT: tl.constexpr = (0xFF << DROPPED & 0xFF) * 0x01010101
        RIGHT: tl.constexpr = (0xFF >> (8 - DROPPED)) * 0x01010101
        high = ((high << DROPPED) & LEFT & _OTHERS) | ((low >> (8 - DROPPED)) & RIGHT)
        low = (low << DROPPED) & LEFT
    return low & keep, (high | (value & _SIGNS)) & keep


@triton.jit
def _largest(value, digits, shown, base, DROPPED: tl.constexpr):
    """The largest key of four weights, of those whose bytes of `shown` are not 0."""
    largest = value * 0
    for i in tl.static_range(4):
        key = (base + ((value >> (8 * i)) & 127) + (((digits >> (8 * i)) & 255) << 7)) << DROPPED
        largest = tl.maximum(largest, tl.where(((shown >> (8 * i)) & 1) != 0, key, 0))
    return largest


@triton.jit
def _marks(value, digits, keep, RADIX: tl.constexpr):
    """The topmost bit of each byte whose weight escapes: it has the largest of all distances.

    `short` is 0 in those bytes alone: with 0x7F added, all others have their topmost bit set.
    """
    short = ((value & _OTHERS) ^ _OTHERS) | (digits ^ ((RADIX - 1) * _EACH))
    return ((short + _OTHERS) & _SIGNS ^ _SIGNS) & keep


@triton.jit
def decode_bytes_tile(
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
    DROPPED: tl.constexpr,
    RADIX: tl.constexpr,
    DIGITS: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
):
    """As `emp_kernels.gpu.unpack_kernel.decode_tile`; 7 bits of the mantissa are stored.

    Returns:
        (words of two weights each, uint32 [N, 4], then the same).
    """
    N: tl.constexpr = TILE // 8
    LIMIT: tl.constexpr = (RADIX << 7) - 1
    k, escaped, base, sections, masked, room, code_bytes = record
    mask_at, values_at, codes_at, escapes_at = sections
    values_room, codes_room = room
    bits_N, sums_N, rank_N, named = read_bits(
        payload + mask_at, start, k, masked, columns, named, N
    )
    some_N = bits_N != 0
    before_N = sums_N << 4

    bytes_N = window(words, values_room, values_at, rank_N, some_N, ALIGN)
    value_a, value_b = _spread_out(bytes_N, before_N)
    # a mask of whole bytes: each bit of the mask chooses byte 0 (0x00) or byte 1 (0xFF) of this
    all_or_none_N = bits_N * 0 + 0xFF00
    keep_a = choose_bytes(all_or_none_N, all_or_none_N, bits_N)
    keep_b = choose_bytes(all_or_none_N, all_or_none_N, bits_N >> 16)
    digits_a = bits_N * 0
    digits_b = bits_N * 0
    if DIGITS > 0:
        if (named <= turned + code_bytes) | (turn == DIGITS - 1):
            bytes_N = window(words, codes_room, codes_at, rank_N - turned, some_N, ALIGN)
            code_a, code_b = _spread_out(bytes_N, before_N)
            digits_a = _digits(code_a, place, RADIX, DIGIT_BITS)
            digits_b = _digits(code_b, place, RADIX, DIGIT_BITS)
        else:
            turns = k * 0 + 1
            while turns > 0:
                index_N = rank_N - turned
                skipped_N = tl.minimum(tl.maximum(0 - index_N, 0), 8)
                end_N = tl.minimum(tl.maximum(code_bytes - index_N, 0), 8)
                here_N = some_N & (skipped_N < end_N)
                from_N = tl.maximum(index_N, 0)
                bytes_N = window(words, codes_room, codes_at, from_N, here_N, ALIGN)
                half_N = (skipped_N * 4).to(tl.uint64)
                code_a, code_b = _spread_out(bytes_N << half_N << half_N, before_N)
                turn_N = _first_bytes(end_N) ^ _first_bytes(skipped_N)
                turn_a, turn_b = _spread_out(turn_N, before_N)
                digits_a |= _digits(code_a, place, RADIX, DIGIT_BITS) & turn_a
                digits_b |= _digits(code_b, place, RADIX, DIGIT_BITS) & turn_b
                if (turn < DIGITS - 1) & (turned + code_bytes < named):
                    turn += 1
                    turned += code_bytes
                    place = next_place(place, RADIX, DIGIT_BITS)
                else:
                    turns = turns * 0
    marks_a = _marks(value_a, digits_a, keep_a, RADIX)
    marks_b = _marks(value_b, digits_b, keep_b, RADIX)
    if CHECKED:
        if base + LIMIT > (0x7FFF >> 7 >> DROPPED << 7):
            shown_a = keep_a & ((marks_a >> 7) * 255 ^ 0xFFFFFFFF)
            shown_b = keep_b & ((marks_b >> 7) * 255 ^ 0xFFFFFFFF)
            value_a, digits_a = value_a & shown_a, digits_a & shown_a
            value_b, digits_b = value_b & shown_b, digits_b & shown_b
            largest_N = tl.maximum(largest_N, _largest(value_a, digits_a, shown_a, base, DROPPED))
            largest_N = tl.maximum(largest_N, _largest(value_b, digits_b, shown_b, base, DROPPED))
    low_a, high_a = _weights(value_a, digits_a, keep_a, base, DROPPED)
    low_b, high_b = _weights(value_b, digits_b, keep_b, base, DROPPED)

    if tl.max(marks_a | marks_b, 0) != 0:
        left_N = (marks_b.to(tl.uint64) << 32) | marks_a.to(tl.uint64)
        low_N = (low_b.to(tl.uint64) << 32) | low_a.to(tl.uint64)
        high_N = (high_b.to(tl.uint64) << 32) | high_a.to(tl.uint64)
        count_N = ((((marks_a >> 7) + (marks_b >> 7)) * _EACH) >> 24).to(tl.int32)
        nth_N = marked + tl.cumsum(count_N, 0) - count_N
        marked += tl.sum(count_N, 0)
        for _ in range(tl.max(count_N, 0)):  # each chunk's first escape, then its second, ...
            first_N = left_N & (0 - left_N)
            stored_N = (left_N != 0) & (nth_N < escaped)
            whole_N = load_escapes(payload, escapes_at, nth_N, stored_N, 2)
            if CHECKED:
                largest_N = tl.maximum(largest_N, whole_N & 0x7FFF)
            column_N = (first_N - (first_N >> 7)) | first_N  # all bits of its byte
            whole_N = whole_N.to(tl.uint64)
            each_N = whole_N * 0 + 0x0101010101010101
            low_N = low_N ^ ((low_N ^ ((whole_N & 255) * each_N)) & column_N)
            high_N = high_N ^ ((high_N ^ ((whole_N >> 8) * each_N)) & column_N)
            left_N ^= first_N
            nth_N += 1
        low_a, low_b = low_N.to(tl.uint32), (low_N >> 32).to(tl.uint32)
        high_a, high_b = high_N.to(tl.uint32), (high_N >> 32).to(tl.uint32)

    # low and high bytes, four weights each, to words of two weights
    first_N, second_N = bits_N * 0 + 0x5140, bits_N * 0 + 0x7362
    even_N2 = tl.join(choose_bytes(low_a, high_a, first_N), choose_bytes(low_b, high_b, first_N))
    odd_N2 = tl.join(choose_bytes(low_a, high_a, second_N), choose_bytes(low_b, high_b, second_N))
    word_N4 = tl.reshape(tl.join(even_N2, odd_N2), [N, 4])
    return word_N4, named, marked, turn, turned, place, largest_N


@triton.jit
def unpack_bytes_row(
    payload,
    words,
    end,
    lines,
    chosen,
    rows,
    out,
    out_words,
    faults,
    columns,
    row_stride,
    DROPPED: tl.constexpr,
    RADIX: tl.constexpr,
    DIGITS: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
    LOWEST: tl.constexpr,
    ALIGN: tl.constexpr,
    WHOLE_WORDS: tl.constexpr,
    TILE: tl.constexpr,
):
    """As `emp_kernels.gpu.unpack_kernel.unpack_row`; 7 bits of the mantissa are stored.

    With WHOLE_WORDS `out_words` is out as int32, and columns and row_stride are even.
    """
    N: tl.constexpr = TILE // 8
    INFINITY: tl.constexpr = 0x7FFF >> 7 >> DROPPED << 7 << DROPPED
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
        word_N4, named, marked, turn, turned, place, largest_N = decode_bytes_tile(
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
            DROPPED,
            RADIX,
            DIGITS,
            DIGIT_BITS,
            ALIGN,
            TILE,
        )
        if chosen is not None:
            word_N4 = tl.where(there, word_N4, 0xFFFFFFFF)
        # each chunk is a store of 16 bytes
        at_N4 = start // 2 + chunk_N[:, None] * 4 + tl.arange(0, 4)[None, :]
        if WHOLE_WORDS:
            there_N4 = out_words + out_row * (row_stride // 2) + at_N4
            tl.store(there_N4, word_N4.to(tl.int32, bitcast=True), mask=at_N4 < columns // 2)
        else:
            there_N4 = out + out_row * row_stride + at_N4 * 2
            tl.store(there_N4, word_N4.to(tl.int16), mask=at_N4 * 2 < columns)
            tl.store(there_N4 + 1, (word_N4 >> 16).to(tl.int16), mask=at_N4 * 2 + 1 < columns)
    if faults is not None:
        bad |= (named != k) | (marked != escaped) | (tl.max(largest_N, 0) >= INFINITY)
        tl.store(faults + row, bad.to(tl.uint8))
