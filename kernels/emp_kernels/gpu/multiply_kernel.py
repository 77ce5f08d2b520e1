"""The kernels that multiply packed rows with a few tokens: a row is decoded once for all of them.

A program takes a part of a row, tile by tile, as the kernels that unpack do. Sums are float32. They
stay apart by chunk until the end: so each is a sum of few products, whatever the row's length.

Legend as in `emp_kernels.gpu.unpack_parts`; T tokens, of which each has C inputs.
"""

import triton
import triton.language as tl

from emp_kernels.gpu.unpack_bytes import decode_bytes_tile
from emp_kernels.gpu.unpack_kernel import decode_tile
from emp_kernels.gpu.unpack_parts import find_turn, read_record

__all__ = ["add_parts", "add_products", "multiply_bytes_row", "multiply_row", "store_sums"]


@triton.jit
def _floats(pattern, BF16: tl.constexpr):
    """Patterns of 16 bits, in the low half of each uint32, or of 32 bits if BF16 is None."""
    if BF16 is None:
        floats = pattern.to(tl.float32, bitcast=True)
    elif BF16:
        floats = (pattern << 16).to(tl.float32, bitcast=True)
    else:
        floats = pattern.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return floats


@triton.jit
def _upper_floats(pattern, BF16: tl.constexpr):
    """Patterns of 16 bits, in the high half of each uint32."""
    if BF16:
        floats = (pattern & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        floats = _floats(pattern >> 16, BF16)
    return floats


@triton.jit
def _rounded(sums, bias, at, BF16: tl.constexpr):
    """Sums, float32, with the bias added, as patterns of the weights' format."""
    if bias is not None:
        sums += _floats(tl.load(bias + at).to(tl.uint32) & _mask_of(BF16), BF16)
    bits = sums.to(tl.uint32, bitcast=True)
    if BF16 is None:
        pattern = bits.to(tl.int32, bitcast=True)
    elif BF16:
        # to the nearest, to even of two; NaN stays NaN
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        pattern = tl.where(sums == sums, even, 0x7FC0).to(tl.int16)
    else:
        pattern = sums.to(tl.float16).to(tl.int16, bitcast=True)
    return pattern


@triton.jit
def _mask_of(BF16: tl.constexpr):
    """The bits of a pattern."""
    return 0xFFFFFFFF if BF16 is None else 0xFFFF


@triton.jit
def _quarters(items_N4):
    """The four columns of a tensor."""
    even_N2, odd_N2 = tl.split(tl.reshape(items_N4, [items_N4.shape[0], 2, 2]))
    first, third = tl.split(even_N2)
    second, fourth = tl.split(odd_N2)
    return first, second, third, fourth


@triton.jit
def _token(t: tl.constexpr, tokens):
    """The token to read for the t-th sum; there are more sums than tokens, which are not stored."""
    return 0 if t == 0 else tl.minimum(tokens - 1, t)


@triton.jit
def _first_tile(
    starts,
    record,
    columns,
    row,
    first,
    RADIX: tl.constexpr,
    DIGITS: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
    LOWEST: tl.constexpr,
    PART: tl.constexpr,
):
    """What `decode_tile` has to know of a row before column `first`, the start of a part."""
    start = starts + (row * tl.cdiv(columns, PART) + first // PART) * 2
    named = tl.load(start)
    marked = tl.load(start + 1)
    lowest = record[2] * 0 + LOWEST
    turn, turned, place = find_turn(named, record[6], lowest, RADIX, DIGITS, DIGIT_BITS)
    return named, marked, turn, turned, place


@triton.jit
def store_sums(
    sums_TN, bias, out, row, rows, tokens, share, WHOLE: tl.constexpr, BF16: tl.constexpr
):
    """Store the outputs of a row, or what a program's share of it adds to them."""
    sums_T = tl.sum(sums_TN, 1)
    token_T = tl.arange(0, sums_T.shape[0])
    if WHOLE:
        there_T = out + token_T.to(tl.int64) * rows + row
        tl.store(there_T, _rounded(sums_T, bias, row, BF16), mask=token_T < tokens)
    else:
        line_T = share.to(tl.int64) * tokens + token_T
        tl.store(out + line_T * rows + row, sums_T, mask=token_T < tokens)


@triton.jit
def add_products(
    sums_TN, weight_8N, x, start, columns, tokens, BF16: tl.constexpr, FULL: tl.constexpr
):
    """The sums of all tokens with a tile's products added.

    Args:
        sums_TN: By token and chunk, float32.
        weight_8N: Patterns of the tile's weights, uint32 [8, N].
        x: See `multiply_row`, and so on.
        start: The tile's first column.
    """
    token_T1 = tl.arange(0, sums_TN.shape[0])[:, None]
    chunk_1N = tl.arange(0, sums_TN.shape[1])[None, :]
    column_8N = start + chunk_1N * 8 + tl.arange(0, 8)[:, None]
    inside_8N = None if FULL else column_8N < columns
    if not FULL:  # past the row's end, whole records may give infinity: its product with 0 is NaN
        weight_8N = tl.where(inside_8N, weight_8N, 0)
    weight_8N = _floats(weight_8N, BF16)
    for t in tl.static_range(sums_TN.shape[0]):
        there_8N = x + column_8N + _token(t, tokens) * columns
        x_8N = tl.load(there_8N, mask=inside_8N, other=None if FULL else 0)
        sum_N = tl.sum(weight_8N * _floats(x_8N.to(tl.uint32), BF16), 0)
        sums_TN = tl.where(token_T1 == t, sums_TN + sum_N[None, :], sums_TN)
    return sums_TN


@triton.jit
def multiply_row(
    payload,
    words,
    end,
    lines,
    starts,
    rows,
    x,
    bias,
    out,
    columns,
    tokens,
    span,
    BITS: tl.constexpr,
    DROPPED: tl.constexpr,
    STORED: tl.constexpr,
    RADIX: tl.constexpr,
    DIGITS: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
    LOWEST: tl.constexpr,
    ALIGN: tl.constexpr,
    PART: tl.constexpr,
    TOKENS: tl.constexpr,
    WHOLE: tl.constexpr,
    BF16: tl.constexpr,
    FULL: tl.constexpr,
    TILE: tl.constexpr,
):
    """Multiply some columns of a row with all tokens.

    Args:
        payload: Pointer to the records, uint8.
        words: The same, int32.
        end: How many words there are.
        lines: Pointer to the row's lines, int64 [rows, LINE].
        starts: See `emp_kernels.gpu.unpack_kernel.unpack_row`.
        rows: Of the records, R.
        x: Pointer to the inputs, patterns [tokens, columns].
        bias: Pointer to patterns [R]; None if there is none.
        out: Pointer to patterns [tokens, R]; if not WHOLE, to float32 [programs of a row, tokens,
            R], without the bias.
        columns: Of a row.
        tokens: TOKENS at most.
        span: Columns of a program, a multiple of PART.
        BF16: Whether patterns of 16 bits are bfloat16; None if patterns have 32 bits.
        FULL: Whether rows are whole tiles.
    """
    N: tl.constexpr = TILE // 8
    row = tl.program_id(0).to(tl.int64)
    record, _ = read_record(payload, end, lines, row, columns, DIGITS, ALIGN)
    share = tl.program_id(1)
    first = share * span
    named, marked, turn, turned, place = _first_tile(
        starts, record, columns, row, first, RADIX, DIGITS, DIGIT_BITS, LOWEST, PART
    )
    sums_TN = tl.zeros([TOKENS, N], tl.float32)
    largest_N = tl.zeros([N], tl.uint32)
    for start in range(first, tl.minimum(first + span, columns), TILE):
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
            False,
            BITS,
            DROPPED,
            STORED,
            RADIX,
            DIGITS,
            DIGIT_BITS,
            ALIGN,
            TILE,
        )
        sums_TN = add_products(sums_TN, weight_8N, x, start, columns, tokens, BF16, FULL)
    store_sums(sums_TN, bias, out, row, rows, tokens, share, WHOLE, BF16)


@triton.jit
def multiply_bytes_row(
    payload,
    words,
    end,
    lines,
    starts,
    rows,
    x_words,
    bias,
    out,
    columns,
    tokens,
    span,
    DROPPED: tl.constexpr,
    RADIX: tl.constexpr,
    DIGITS: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
    LOWEST: tl.constexpr,
    ALIGN: tl.constexpr,
    PART: tl.constexpr,
    TOKENS: tl.constexpr,
    WHOLE: tl.constexpr,
    BF16: tl.constexpr,
    FULL: tl.constexpr,
    TILE: tl.constexpr,
):
    """As `multiply_row`; 7 bits of the mantissa are stored, and columns are even.

    `x_words` points to the inputs as int32 [tokens, columns / 2], two of them each.
    """
    N: tl.constexpr = TILE // 8
    row = tl.program_id(0).to(tl.int64)
    record, _ = read_record(payload, end, lines, row, columns, DIGITS, ALIGN)
    share = tl.program_id(1)
    first = share * span
    named, marked, turn, turned, place = _first_tile(
        starts, record, columns, row, first, RADIX, DIGITS, DIGIT_BITS, LOWEST, PART
    )
    token_T1 = tl.arange(0, TOKENS)[:, None]
    sums_TN = tl.zeros([TOKENS, N], tl.float32)
    largest_N = tl.zeros([N], tl.uint32)
    for start in range(first, tl.minimum(first + span, columns), TILE):
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
            False,
            DROPPED,
            RADIX,
            DIGITS,
            DIGIT_BITS,
            ALIGN,
            TILE,
        )
        w0, w1, w2, w3 = _quarters(word_N4)
        at_N4 = start // 2 + tl.arange(0, N)[:, None] * 4 + tl.arange(0, 4)[None, :]
        for t in tl.static_range(TOKENS):
            there_N4 = x_words + at_N4 + _token(t, tokens) * (columns // 2)
            if FULL:
                x_N4 = tl.load(there_N4)
            else:
                x_N4 = tl.load(there_N4, mask=at_N4 < columns // 2, other=0)
            x0, x1, x2, x3 = _quarters(x_N4.to(tl.uint32, bitcast=True))
            sum_N = tl.sum(tl.where(token_T1 == t, sums_TN, 0.0), 0)  # the registers of one token
            sum_N += _floats(w0, BF16) * _floats(x0, BF16)
            sum_N += _upper_floats(w0, BF16) * _upper_floats(x0, BF16)
            sum_N += _floats(w1, BF16) * _floats(x1, BF16)
            sum_N += _upper_floats(w1, BF16) * _upper_floats(x1, BF16)
            sum_N += _floats(w2, BF16) * _floats(x2, BF16)
            sum_N += _upper_floats(w2, BF16) * _upper_floats(x2, BF16)
            sum_N += _floats(w3, BF16) * _floats(x3, BF16)
            sum_N += _upper_floats(w3, BF16) * _upper_floats(x3, BF16)
            sums_TN = tl.where(token_T1 == t, sum_N[None, :], sums_TN)
    store_sums(sums_TN, bias, out, row, rows, tokens, share, WHOLE, BF16)


@triton.jit
def add_parts(sums, bias, out, count, rows, parts, BF16: tl.constexpr, BLOCK: tl.constexpr):
    """Add up what the parts of rows give, and round.

    Args:
        sums: Pointer to float32 [parts, tokens, rows].
        bias: As for `multiply_row`.
        out: Pointer to patterns [tokens, rows].
        count: How many these are.
        rows: Of the records.
        parts: Programs of a row.
    """
    at_B = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside_B = at_B < count
    sums_B = tl.zeros([BLOCK], tl.float32)
    for part in range(parts):
        sums_B += tl.load(sums + part * count + at_B, mask=inside_B, other=0.0)
    row_B = tl.where(inside_B, at_B % rows, 0)
    tl.store(out + at_B, _rounded(sums_B, bias, row_B, BF16), mask=inside_B)
