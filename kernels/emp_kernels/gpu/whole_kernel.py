"""The kernels on whole records: check them, decode rows of them, multiply rows with a few tokens.

Legend as in `emp_kernels.gpu.whole_parts`. `widths` are the tiers' bits, known when a kernel is
compiled.
"""

import triton
import triton.language as tl

from emp_kernels.gpu.multiply_kernel import add_products, store_sums
from emp_kernels.gpu.unpack_parts import choose_row, load_escapes, spread
from emp_kernels.gpu.whole_parts import append, decode_whole_tile, read_sections

__all__ = ["check_record", "find_ranks", "multiply_whole_row", "unpack_whole_row"]


@triton.jit
def _dirty(payload, at, n, stripes, sound):
    """Whether some stripes, of n bits each, have a bit set past their last weight."""
    dirty = n < 0
    for i in range(stripes):
        last = payload + at + i * ((n + 7) // 8) + n // 8
        byte = tl.load(last, mask=sound & (n % 8 > 0), other=0).to(tl.int32)
        dirty |= (byte >> (n % 8)) != 0
    return dirty


@triton.jit
def _count_past(payload, at, n, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """How many codes of a tier, of n weights, have all bits set."""
    stripe = (n + 7) // 8
    past = n * 0
    for start in range(0, stripe, BLOCK):
        byte_B = start + tl.arange(0, BLOCK)
        there_B = payload + at + byte_B
        all_B = tl.load(there_B, mask=byte_B < stripe, other=0).to(tl.uint32)
        for bit in tl.static_range(1, WIDTH):
            all_B &= tl.load(there_B + bit * stripe, mask=byte_B < stripe, other=0).to(tl.uint32)
        past += tl.sum(((spread(all_B) * 0x11111111) >> 28).to(tl.int32), 0)
    return past


@triton.jit
def check_record(
    payload,
    offsets,
    known,
    sections,
    faults,
    all_rows,
    columns,
    RECORD_ROWS: tl.constexpr,
    WIDTHS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    EXPONENT_BITS: tl.constexpr,
    DROPPED: tl.constexpr,
    ESCAPE_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find where the program's record has its parts, and whether it contradicts itself.

    Args:
        payload: Pointer to the records, uint8.
        offsets: Pointer to int64 [records + 1], where each record starts, and the end.
        known: Pointer to uint8 [256], 1 for each exponent of the lists.
        sections: Pointer to int64 [records, tiers + 2], written: where values, tiers and escapes
            start.
        faults: Pointer to uint8 [records], written: 0 where a record is sound.
        all_rows: Of the tensor.
        columns: Of a row.
    """
    TIERS: tl.constexpr = len(WIDTHS)
    STRIPES: tl.constexpr = VALUE_BITS % 8
    record = tl.program_id(0).to(tl.int64)
    n = (tl.minimum(all_rows - record * RECORD_ROWS, RECORD_ROWS) * columns).to(tl.int32)
    begin = tl.load(offsets + record)
    stop = tl.load(offsets + record + 1)
    line = sections + record * (TIERS + 2)
    tl.store(line, begin)
    stripes_at = begin + n * (VALUE_BITS // 8)
    at = stripes_at + STRIPES * ((n + 7) // 8)
    sound = at <= stop
    bad = _dirty(payload, stripes_at, n, STRIPES, sound)
    for t in tl.static_range(TIERS):
        tl.store(line + (t + 1), at)
        after = at + WIDTHS[t] * ((n + 7) // 8)
        sound &= after <= stop
        n = tl.where(sound, n, 0)
        bad |= _dirty(payload, at, n, WIDTHS[t], sound)
        n = _count_past(payload, at, n, WIDTHS[t], BLOCK)
        at = after
    tl.store(line + (TIERS + 1), at)
    sound &= at + n * ESCAPE_BYTES == stop
    n = tl.where(sound, n, 0)
    needless = n * 0
    for start in range(0, n, BLOCK):
        item_B = start + tl.arange(0, BLOCK)
        escape_B = load_escapes(payload, at, item_B, item_B < n, ESCAPE_BYTES)
        exponent_B = escape_B >> DROPPED
        plain_B = (escape_B & ((1 << DROPPED) - 1)) == 0
        known_B = tl.load(known + (exponent_B & 255), mask=item_B < n, other=0) > 0
        wrong_B = (exponent_B >> EXPONENT_BITS > 0) | (plain_B & known_B)
        needless += tl.sum((wrong_B & (item_B < n)).to(tl.int32), 0)
    tl.store(faults + record, (bad | (needless > 0) | (sound == 0)).to(tl.uint8))


@triton.jit
def find_ranks(
    payload,
    words,
    end,
    sections,
    lists,
    ranks,
    all_rows,
    columns,
    RECORD_ROWS: tl.constexpr,
    PART: tl.constexpr,
    WIDTHS: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    DROPPED: tl.constexpr,
    CONTEXT: tl.constexpr,
    ESCAPE_BYTES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Count what comes before each part of each row of the program's record, which is sound.

    Args:
        payload: Pointer to the records, uint8.
        words: The same, int32.
        end: How many words there are.
        sections: As `check_record` fills it.
        lists: See `decode_whole_tile`.
        ranks: Pointer to int32 [all rows, parts, tiers], written: how many weights of the record
            get to each tier but the first before a part of PART columns, and how many escape.
        all_rows: Of the tensor.
        columns: Of a row.
    """
    TIERS: tl.constexpr = len(WIDTHS)
    record = tl.program_id(0).to(tl.int64)
    at, room = read_sections(sections, end, record, TIERS)
    rows = tl.minimum(all_rows - record * RECORD_ROWS, RECORD_ROWS).to(tl.int32)
    counts = ()
    for _ in tl.static_range(TIERS):
        counts = append(counts, rows * 0)
    for row in range(rows):
        for start in range(0, columns, TILE):
            if start % PART == 0:
                line = (record * RECORD_ROWS + row) * tl.cdiv(columns, PART) + start // PART
                for t in tl.static_range(TIERS):
                    tl.store(ranks + line * TIERS + t, counts[t])
            _weight_8N, counts = decode_whole_tile(
                payload,
                words,
                lists,
                at,
                room,
                rows * columns,
                row * columns + start,
                columns - start,
                counts,
                WIDTHS,
                BITS,
                MANTISSA,
                DROPPED,
                CONTEXT,
                ESCAPE_BYTES,
                TILE,
            )


@triton.jit
def _open_row(sections, end, ranks, row, first, all_rows, columns, RECORD_ROWS, PART, TIERS):
    """What `decode_whole_tile` has to know of a row before column `first`, the start of a part.

    Returns:
        (where the record's parts start, words behind them, weights of the record, index of the
        row's first weight, ranks).
    """
    record = row // RECORD_ROWS
    at, room = read_sections(sections, end, record, TIERS)
    weights = (tl.minimum(all_rows - record * RECORD_ROWS, RECORD_ROWS) * columns).to(tl.int32)
    index = ((row - record * RECORD_ROWS) * columns).to(tl.int32)
    line = ranks + (row * tl.cdiv(columns, PART) + first // PART) * TIERS
    counts = ()
    for t in tl.static_range(TIERS):
        counts = append(counts, tl.load(line + t))
    return at, room, weights, index, counts


@triton.jit
def unpack_whole_row(
    payload,
    words,
    end,
    sections,
    lists,
    ranks,
    chosen,
    first_row,
    rows,
    all_rows,
    out,
    columns,
    row_stride,
    RECORD_ROWS: tl.constexpr,
    PART: tl.constexpr,
    WIDTHS: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    DROPPED: tl.constexpr,
    CONTEXT: tl.constexpr,
    ESCAPE_BYTES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Decode the program's row.

    Args:
        payload: As for `find_ranks`.
        words: The same.
        end: The same.
        sections: The same.
        lists: The same.
        ranks: As it fills them.
        chosen: See `choose_row`; of a row that is not there, all weights are NaN.
        first_row: The row of the tensor that rows are numbered from.
        rows: How many there are from there on.
        all_rows: Of the tensor.
        out: Pointer to the weights, int16 or int32.
        columns: Of a row.
        row_stride: Of out.
    """
    out_row = tl.program_id(0).to(tl.int64)
    row, there = choose_row(chosen, out_row, rows)
    at, room, weights, index, counts = _open_row(
        sections,
        end,
        ranks,
        first_row + row,
        0,
        all_rows,
        columns,
        RECORD_ROWS,
        PART,
        len(WIDTHS),
    )
    for start in range(0, columns, TILE):
        weight_8N, counts = decode_whole_tile(
            payload,
            words,
            lists,
            at,
            room,
            weights,
            index + start,
            columns - start,
            counts,
            WIDTHS,
            BITS,
            MANTISSA,
            DROPPED,
            CONTEXT,
            ESCAPE_BYTES,
            TILE,
        )
        column_N8 = start + tl.arange(0, TILE // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
        weight_N8 = tl.trans(weight_8N.to(out.dtype.element_ty))
        if chosen is not None:
            weight_N8 = tl.where(there, weight_N8, -1)
        tl.store(out + out_row * row_stride + column_N8, weight_N8, mask=column_N8 < columns)


@triton.jit
def multiply_whole_row(
    payload,
    words,
    end,
    sections,
    lists,
    ranks,
    first_row,
    rows,
    all_rows,
    x,
    bias,
    out,
    columns,
    tokens,
    span,
    TOKENS: tl.constexpr,
    WHOLE: tl.constexpr,
    BF16: tl.constexpr,
    FULL: tl.constexpr,
    RECORD_ROWS: tl.constexpr,
    PART: tl.constexpr,
    WIDTHS: tl.constexpr,
    BITS: tl.constexpr,
    MANTISSA: tl.constexpr,
    DROPPED: tl.constexpr,
    CONTEXT: tl.constexpr,
    ESCAPE_BYTES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Multiply some columns of a row with all tokens.

    Args: as for `unpack_whole_row` and `emp_kernels.gpu.multiply_kernel.multiply_row`.
    """
    row = tl.program_id(0).to(tl.int64)
    share = tl.program_id(1)
    first = share * span
    at, room, weights, index, counts = _open_row(
        sections,
        end,
        ranks,
        first_row + row,
        first,
        all_rows,
        columns,
        RECORD_ROWS,
        PART,
        len(WIDTHS),
    )
    sums_TN = tl.zeros([TOKENS, TILE // 8], tl.float32)
    for start in range(first, tl.minimum(first + span, columns), TILE):
        weight_8N, counts = decode_whole_tile(
            payload,
            words,
            lists,
            at,
            room,
            weights,
            index + start,
            columns - start,
            counts,
            WIDTHS,
            BITS,
            MANTISSA,
            DROPPED,
            CONTEXT,
            ESCAPE_BYTES,
            TILE,
        )
        sums_TN = add_products(sums_TN, weight_8N, x, start, columns, tokens, BF16, FULL)
    store_sums(sums_TN, bias, out, row, rows, tokens, share, WHOLE, BF16)
