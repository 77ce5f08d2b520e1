"""What the kernels that unpack share: where the parts of records lie, and reading them.

Records may start at any byte, but loads are of whole aligned words of four bytes, several of them
shifted together where need be: a byte at a time they would take as many instructions each.

Legend as in `emp_kernels.gpu`; a chunk is eight columns, one byte of the mask: N chunks a tile.
A weight's rank j is how many of its row are kept before it: its parts lie at place j of their
sections.
"""

import triton
import triton.language as tl

from emp_kernels.gpu_devices import interpreted

__all__ = [
    "LINE",
    "choose_bytes",
    "choose_row",
    "find_turn",
    "find_word",
    "integers",
    "load_escapes",
    "load_word",
    "next_place",
    "read_bits",
    "read_record",
    "room_behind",
    "spread",
    "window",
]

LINE = tl.constexpr(7)
"""int64 numbers that a kernel takes for each row: kept, escaped, base, and where its four sections
start."""


_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def spread(byte):
    """The bits of a byte, each in the lowest of four bits of a uint32.

    So that a multiplication by 0x11111111 adds them up, with all partial sums in four bits each.
    """
    bits = (byte | (byte << 12)) & 0x000F000F
    bits = (bits | (bits << 6)) & 0x03030303
    return (bits | (bits << 3)) & 0x11111111


@triton.jit
def choose_bytes(low, high, selector):
    """Four of eight bytes: those that the lowest four nibbles of a selector name, each below 8.

    One instruction of the GPU, ``prmt``, for which Triton has no function.
    """
    if _INTERPRETED:
        both = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
        chosen = low * 0
        for i in tl.static_range(4):
            place = ((selector >> (4 * i)) & 7) * 8
            chosen |= ((both >> place) & 255).to(tl.uint32) << (8 * i)
    else:
        chosen = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [low, high, selector],
            dtype=tl.uint32,
            is_pure=True,
            pack=1,
        )
    return chosen


@triton.jit
def find_word(words, at, index, BITS: tl.constexpr, ALIGN: tl.constexpr):
    """Where integers of BITS bits begin: a word to count from, words from there, and bits in them.

    Args:
        words: Pointer to the payload as words, int32.
        at: Byte of the payload where the integers begin, a multiple of ALIGN.
        index: Which integers.
    """
    skipped = (at & 3).to(tl.int32) if ALIGN % 4 else 0
    if BITS == 8:
        byte = index + skipped
        word = byte >> 2
        bit = (byte & 3) * 8
    else:
        bit = index * BITS + skipped * 8
        word = bit >> 5
        bit = bit & 31
    return words + (at >> 2), word, bit.to(tl.uint64)


@triton.jit
def room_behind(end, at):
    """Words of the payload from byte `at` on, int32; None if `end`, the number of all, is None."""
    return None if end is None else tl.minimum(end - (at >> 2), 0x7FFFFFFF).to(tl.int32)


@triton.jit
def load_word(first, word, room, wanted):
    """A word of four bytes as uint64; anything where it is not wanted.

    Args:
        first: Pointer to the word that others are counted from.
        word: How many words behind it.
        room: How many words there are from it on; None if all that is wanted is there.
        wanted: Which words.
    """
    there = wanted if room is None else wanted & (word < room)
    return tl.load(first + word, mask=there).to(tl.uint32, bitcast=True).to(tl.uint64)


@triton.jit
def window(words, room, at, index, wanted, ALIGN: tl.constexpr):
    """Eight bytes from byte `at` + index on, as uint64; anything where they are not wanted.

    Args:
        words: Pointer to the payload as words, int32.
        room: What `room_behind` gives for `at`.
        at: Byte of the payload, a multiple of ALIGN.
        index: How many bytes behind it.
        wanted: Which of them.
    """
    first, word, bit = find_word(words, at, index, 8, ALIGN)
    middle = load_word(first, word + 1, room, wanted)
    start = (middle << 32) | load_word(first, word, room, wanted)
    low = (start >> bit).to(tl.uint32).to(tl.uint64)
    rest = (load_word(first, word + 2, room, wanted) << 32) | middle
    high = (rest >> bit).to(tl.uint32).to(tl.uint64)
    return (high << 32) | low


@triton.jit
def integers(words, room, at, index, wanted, BITS: tl.constexpr, ALIGN: tl.constexpr):
    """Integers of BITS bits, and in the bits above what follows; anything where not wanted."""
    first, word, bit = find_word(words, at, index, BITS, ALIGN)
    above = load_word(first, word + 1, room, wanted) << 32
    return ((above | load_word(first, word, room, wanted)) >> bit).to(tl.uint32)


@triton.jit
def next_place(place, RADIX: tl.constexpr, DIGIT_BITS: tl.constexpr):
    """The place of the next digit, given that of one; see `_digit` and `_digits`."""
    return place + DIGIT_BITS if DIGIT_BITS > 0 else (place + (RADIX - 1)) // RADIX


@triton.jit
def find_turn(
    rank, code_bytes, lowest, RADIX: tl.constexpr, DIGITS: tl.constexpr, DIGIT_BITS: tl.constexpr
):
    """Which digit of its byte the code of a rank is.

    Returns:
        (number of the digit, rank of the first code that is this digit, place of the digit).
    """
    turn = rank * 0
    turned = rank * 0
    place = lowest
    if DIGITS > 0:
        while (turn < DIGITS - 1) & (turned + code_bytes < rank):
            turn += 1
            turned += code_bytes
            place = next_place(place, RADIX, DIGIT_BITS)
    return turn, turned, place


@triton.jit
def load_escapes(payload, at, rank, wanted, ITEM_BYTES: tl.constexpr):
    """Whole weights, which may start at any byte, uint32; 0 where they are not wanted."""
    start = payload + at + rank * ITEM_BYTES
    bits = tl.load(start, mask=wanted, other=0).to(tl.uint32)
    for i in tl.static_range(1, ITEM_BYTES):
        bits |= tl.load(start + i, mask=wanted, other=0).to(tl.uint32) << (8 * i)
    return bits


@triton.jit
def choose_row(chosen, row, rows):
    """The row that a program works on, and whether there is such a row; if not it is the first.

    Args:
        chosen: Pointer to the rows that are asked for, one a program, int64; None if these are all.
        row: Number of the program, int64.
        rows: How many rows there are.
    """
    if chosen is not None:
        row = tl.load(chosen + row)
    there = (row >= 0) & (row < rows)
    return tl.where(there, row, 0), there


@triton.jit
def read_record(payload, end, lines, row, columns, DIGITS: tl.constexpr, ALIGN: tl.constexpr):
    """Read a row's line, and check the end of its mask.

    Args:
        payload: Pointer to the records, uint8.
        end: How many words there are, int64; None if 32 bytes more than records take may be read.
        lines: Pointer to the rows' lines, int64 [R, LINE].
        row: Of them.
        columns: Of the row.

    Returns:
        ((weights kept, escapes, window base, where mask, values, codes and escapes begin, how many
        columns the mask has bits for: all or none, room behind the start of values, and of codes,
        bytes of codes), whether the mask names columns past the last one).
    """
    line = lines + row * LINE
    k = tl.load(line).to(tl.int32)
    escaped = tl.load(line + 1).to(tl.int32)
    base = tl.load(line + 2).to(tl.uint32)
    mask_at = tl.multiple_of(tl.load(line + 3), ALIGN)
    values_at = tl.multiple_of(tl.load(line + 4), ALIGN)
    codes_at = tl.multiple_of(tl.load(line + 5), ALIGN)
    escapes_at = tl.multiple_of(tl.load(line + 6), ALIGN)
    masked = tl.where((k > 0) & (k < columns), columns, 0)
    last = tl.load(payload + mask_at + masked // 8, mask=masked % 8 > 0, other=0).to(tl.int32)
    bad = (last >> (masked % 8)) != 0
    room = (room_behind(end, values_at), room_behind(end, codes_at))
    code_bytes = (k + DIGITS - 1) // DIGITS if DIGITS else k
    sections = (mask_at, values_at, codes_at, escapes_at)
    return (k, escaped, base, sections, masked, room, code_bytes), bad


@triton.jit
def read_bits(mask_ptr, start, k, masked, columns, named, N: tl.constexpr):
    """Read a tile's mask: of each chunk of eight columns, a bit in every fourth for each kept one.

    Args:
        mask_ptr: The mask.
        start: The tile's first column.
        k: Weights kept in the row.
        masked: Columns that the mask has bits for.
        columns: Columns of the row.
        named: Columns that it has named before the tile.
        N: Chunks of a tile.

    Returns:
        (bits [N], none once more than k are named, so that a damaged mask makes nothing be read
        past the record; in each four bits, how many of the chunk are kept up to there, [N]; rank of
        each chunk's first weight, [N]; columns named up to the tile's end).
    """
    at_N = start // 8 + tl.arange(0, N)
    byte_N = tl.load(mask_ptr + at_N, mask=at_N * 8 < masked, other=0).to(tl.uint32)
    if k == columns:
        byte_N = ((1 << tl.minimum(tl.maximum(k - at_N * 8, 0), 8)) - 1).to(tl.uint32)
    bits_N = spread(byte_N)
    sums_N = bits_N * 0x11111111
    count_N = (sums_N >> 28).to(tl.int32)
    rank_N = named + tl.cumsum(count_N, 0) - count_N
    named += tl.sum(count_N, 0)
    return tl.where(named <= k, bits_N, 0), sums_N, rank_N, named
