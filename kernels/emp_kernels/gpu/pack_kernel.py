"""Rows of weights to packed records on a device: one kernel, which reads each weight once.

A program takes rows by number, one after the other. Of each it finds what stays, writes the kept
weights side by side to scratch memory of its own (which stays in the caches), finds the window and
the escapes there, learns where its record begins, and writes it.

Where records begin is a scan along the rows by decoupled look-back (Merrill and Garland,
"Single-pass Parallel Prefix Scan with Decoupled Look-back", 2016): each row tells how long its
record is, then adds up what the rows before it have told, back to one that knows where its own
record ends. Rows are given out in their order, so those that a program waits for are under work.
"""

import triton
import triton.language as tl

from emp_kernels.gpu.common import magnitudes
from emp_kernels.gpu.decide import PER_ROW, decide_row, tile_keeps

__all__ = ["END_KNOWN", "LENGTH_KNOWN", "begin_record", "pack_kernel"]

WINDOW = tl.constexpr(64)
"""Rows before its own that a program looks back at, at a time."""

LENGTH_KNOWN = tl.constexpr(1 << 61)
END_KNOWN = tl.constexpr(1 << 62)
"""What a row has told so far, besides the number of bytes: of its record, or up to its end."""

BYTES = tl.constexpr((1 << 61) - 1)


@triton.jit
def _patterns(kept_ptr, j_T, KEY_MASK: tl.constexpr):
    """Kept weights: their patterns, as they are stored, and their keys.

    Past the last one, within the tile, they are whatever the scratch memory holds.
    """
    pattern_T = tl.load(kept_ptr + j_T)
    return pattern_T, (pattern_T & KEY_MASK).to(tl.int32)


@triton.jit
def _distances(key_T, base, DROPPED: tl.constexpr, LIMIT: tl.constexpr):
    """How far keys lie above the window's base; LIMIT where they escape."""
    away_T = ((key_T >> DROPPED) - base).to(tl.uint32, bitcast=True)  # those below are far above
    distance_T = tl.minimum(away_T, LIMIT).to(tl.int32, bitcast=True)
    if DROPPED > 0:
        distance_T = tl.where((key_T & ((1 << DROPPED) - 1)) == 0, distance_T, LIMIT)
    return distance_T


@triton.jit
def _compress_row(
    row_ptr,
    given_ptr,
    kept_ptr,
    mask_ptr,
    cut,
    end,
    RULE: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write a row's kept weights side by side, and its mask; returns (how many, the least key).

    The first place is one of no use.
    """
    BYTES_A_TILE: tl.constexpr = TILE // 8
    kept = tl.full([], 0, tl.int32)
    smallest_T = tl.full([TILE], KEY_MASK, tl.int32)
    for start in range(0, COLUMNS, TILE):
        pattern_T, key_T, keep_T = tile_keeps(
            row_ptr, given_ptr, start, cut, end, RULE, COLUMNS, KEY_MASK, TILE
        )
        number_T = tl.cumsum(keep_T.to(tl.int32), 0) + kept
        # those that go all go to one place of no use: cheaper than a mask for each
        tl.store(kept_ptr + tl.where(keep_T, number_T, 0), pattern_T)
        kept = tl.max(number_T, 0)
        if RULE != PER_ROW:
            smallest_T = tl.minimum(smallest_T, tl.where(keep_T, key_T, KEY_MASK))
        bit_T = keep_T.to(tl.int32) << (tl.arange(0, TILE) & 7)
        byte_B = start // 8 + tl.arange(0, BYTES_A_TILE)
        bits_B = tl.sum(tl.reshape(bit_T, (BYTES_A_TILE, 8)), 1)
        tl.store(mask_ptr + byte_B, bits_B.to(tl.uint8), mask=byte_B < (COLUMNS + 7) // 8)
    smallest = cut
    if RULE != PER_ROW:
        smallest = tl.min(smallest_T, 0)
    return kept, smallest


@triton.jit
def _look_over(
    kept_ptr,
    k,
    base,
    KEY_MASK: tl.constexpr,
    MANTISSA: tl.constexpr,
    SCALE: tl.constexpr,
    DROPPED: tl.constexpr,
    LIMIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """How many kept weights escape, and the sum of the magnitudes of all, float64."""
    escaped_T = tl.zeros([TILE], tl.int32)
    mass_T = tl.zeros([TILE], tl.float64)
    for start in range(0, k, TILE):
        j_T = start + tl.arange(0, TILE)
        _, key_T = _patterns(kept_ptr, j_T, KEY_MASK)
        escapes_T = _distances(key_T, base, DROPPED, LIMIT) == LIMIT
        escaped_T += (escapes_T & (j_T < k)).to(tl.int32)
        mass_T += magnitudes(tl.where(j_T < k, key_T, 0), MANTISSA, SCALE)
    return tl.sum(escaped_T, 0), tl.sum(mass_T, 0)


@triton.jit
def _fullest_binades(
    kept_ptr,
    binades_ptr,
    k,
    base,
    KEY_MASK: tl.constexpr,
    DROPPED: tl.constexpr,
    STORED: tl.constexpr,
    RADIX: tl.constexpr,
    TILE: tl.constexpr,
):
    """How far above the base the first of RADIX binades begins that together hold most weights."""
    count_B = tl.zeros([256], tl.int32)
    for start in range(0, k, TILE):
        j_T = start + tl.arange(0, TILE)
        _, key_T = _patterns(kept_ptr, j_T, KEY_MASK)
        binade_T = ((key_T >> DROPPED) - base) >> STORED
        count_B += tl.histogram(binade_T, 256, mask=j_T < k)
    binade_B = tl.arange(0, 256)
    tl.store(binades_ptr + binade_B, count_B)
    tl.debug_barrier()  # each is read by the threads of others, too
    inside_B = tl.zeros([256], tl.int32)
    for i in tl.static_range(RADIX):
        within_B = binade_B + i < 256
        inside_B += tl.load(binades_ptr + binade_B + i, mask=within_B, other=0)
    inside_B = tl.where(binade_B <= 256 - RADIX, inside_B, -1)
    return tl.argmax(inside_B, 0) << STORED


@triton.jit
def begin_record(told_ptr, row, nbytes):
    """Tell how long a row's record is, and learn from the rows before it where it begins."""
    tl.atomic_xchg(told_ptr + row, nbytes | LENGTH_KNOWN)
    begin = tl.full([], 0, tl.int64)
    last = row.to(tl.int64) - 1
    found = tl.full([], 0, tl.int32)
    while found == 0:
        before_W = last - tl.arange(0, WINDOW)
        told_W = tl.load(told_ptr + before_W, mask=before_W >= 0, other=END_KNOWN, volatile=True)
        nearest = tl.min(tl.where(told_W >= END_KNOWN, tl.arange(0, WINDOW), WINDOW), 0)
        needed_W = tl.arange(0, WINDOW) <= nearest
        if tl.min(tl.where(needed_W, told_W, END_KNOWN), 0) != 0:
            begin += tl.sum(tl.where(needed_W, told_W & BYTES, 0), 0)
            last -= WINDOW
            found = (nearest < WINDOW).to(tl.int32)
    tl.atomic_xchg(told_ptr + row, (begin + nbytes) | END_KNOWN)
    return begin


@triton.jit
def _write_mask(mask_ptr, out_ptr, length, COLUMNS: tl.constexpr, TILE: tl.constexpr):
    """Copy a row's mask, and zeros up to the section's end."""
    for start in range(0, length, TILE):
        byte_T = start + tl.arange(0, TILE)
        bits_T = tl.load(mask_ptr + byte_T, mask=byte_T < (COLUMNS + 7) // 8, other=0)
        tl.store(out_ptr + byte_T, bits_T, mask=byte_T < length)


@triton.jit
def _values_of(
    kept_ptr,
    j_T,
    k,
    base,
    KEY_MASK: tl.constexpr,
    SIGN: tl.constexpr,
    DROPPED: tl.constexpr,
    STORED: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Sign and low bits of kept weights, int32; 0 past the last one."""
    if STORED == 7:  # byte for weight: tile for tile
        pattern_T, key_T = _patterns(kept_ptr, j_T, KEY_MASK)
    else:
        pattern_T = tl.load(kept_ptr + j_T, mask=j_T < k, other=0)
        key_T = (pattern_T & KEY_MASK).to(tl.int32)
    low_T = _distances(key_T, base, DROPPED, LIMIT) & ((1 << STORED) - 1)
    sign_T = (pattern_T >> SIGN).to(tl.int32) & 1
    return tl.where(j_T < k, (sign_T << STORED) | low_T, 0)


@triton.jit
def _write_values(
    kept_ptr,
    out_ptr,
    k,
    base,
    length,
    KEY_MASK: tl.constexpr,
    SIGN: tl.constexpr,
    DROPPED: tl.constexpr,
    STORED: tl.constexpr,
    LIMIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Byte by byte the 1 + STORED bits of each kept weight, and zeros up to the section's end."""
    WIDTH: tl.constexpr = STORED + 1
    WEIGHTS_A_BYTE: tl.constexpr = 1 if WIDTH == 8 else (WIDTH + 6) // WIDTH + 1
    for start in range(0, length, TILE):
        byte_T = start + tl.arange(0, TILE)
        first_T = byte_T if WIDTH == 8 else (byte_T.to(tl.int64) * 8 // WIDTH).to(tl.int32)
        bits_T = tl.zeros([TILE], tl.int32)
        for i in tl.static_range(WEIGHTS_A_BYTE):
            value_T = _values_of(
                kept_ptr, first_T + i, k, base, KEY_MASK, SIGN, DROPPED, STORED, LIMIT
            )
            if WIDTH == 8:
                bits_T = value_T
            else:
                up_T = ((first_T + i).to(tl.int64) * WIDTH - byte_T.to(tl.int64) * 8).to(tl.int32)
                up_T = tl.minimum(up_T, 8)
                left_T = value_T << tl.maximum(up_T, 0)
                bits_T |= tl.where(up_T < 0, value_T >> tl.maximum(-up_T, 0), left_T) & 255
        tl.store(out_ptr + byte_T, bits_T.to(tl.uint8), mask=byte_T < length)


@triton.jit
def _write_codes(
    kept_ptr,
    out_ptr,
    k,
    base,
    length,
    KEY_MASK: tl.constexpr,
    DROPPED: tl.constexpr,
    STORED: tl.constexpr,
    LIMIT: tl.constexpr,
    RADIX: tl.constexpr,
    DIGITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Byte i holds digits of weights i, i + m, i + 2m, ...; zeros up to the section's end."""
    m = (k + DIGITS - 1) // DIGITS
    for start in range(0, length, TILE):
        byte_T = start + tl.arange(0, TILE)
        sum_T = tl.zeros([TILE], tl.int32)
        for digit in tl.static_range(DIGITS):
            there_T = (byte_T < m) & (byte_T < k - digit * m)
            pattern_T = tl.load(kept_ptr + digit * m + byte_T, mask=there_T, other=0)
            key_T = (pattern_T & KEY_MASK).to(tl.int32)
            code_T = _distances(key_T, base, DROPPED, LIMIT) >> STORED
            sum_T += tl.where(there_T, code_T, 0) * RADIX**digit
        tl.store(out_ptr + byte_T, sum_T.to(tl.uint8), mask=byte_T < length)


@triton.jit
def _write_escapes(
    kept_ptr,
    out_ptr,
    k,
    base,
    escaped,
    length,
    KEY_MASK: tl.constexpr,
    DROPPED: tl.constexpr,
    LIMIT: tl.constexpr,
    ITEM: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
):
    """The whole weights that escape, ITEM bytes each, and zeros up to the section's end."""
    WHOLE: tl.constexpr = ALIGN % ITEM == 0
    item_ptr = out_ptr.to(tl.pointer_type(kept_ptr.dtype.element_ty)) if WHOLE else out_ptr
    found = tl.full([], 0, tl.int32)
    for start in range(0, k, TILE):
        j_T = start + tl.arange(0, TILE)
        pattern_T, key_T = _patterns(kept_ptr, j_T, KEY_MASK)
        escapes_T = (_distances(key_T, base, DROPPED, LIMIT) == LIMIT) & (j_T < k)
        here = tl.sum(escapes_T.to(tl.int32), 0)
        if here > 0:  # about every second tile has none
            at_T = found + tl.cumsum(escapes_T.to(tl.int32), 0) - 1
            if WHOLE:
                tl.store(item_ptr + at_T, pattern_T, mask=escapes_T)
            else:
                for i in tl.static_range(ITEM):
                    byte_T = (pattern_T >> (8 * i)) & 255
                    tl.store(out_ptr + at_T * ITEM + i, byte_T.to(tl.uint8), mask=escapes_T)
        found += here
    pad_T = tl.arange(0, 64)
    tl.store(
        out_ptr + escaped * ITEM + pad_T,
        pad_T.to(tl.uint8) * 0,
        mask=escaped * ITEM + pad_T < length,
    )


@triton.jit
def _padded(nbytes, ALIGN: tl.constexpr):
    return tl.multiple_of((nbytes + ALIGN - 1) // ALIGN * ALIGN, ALIGN)


@triton.jit(do_not_specialize=["rows", "threshold"])
def pack_kernel(
    w_ptr,  # int16 or int32 [R, C], `row_stride` apart
    given_ptr,  # uint8 [R, ⌈C/8⌉] where RULE is GIVEN
    beta_ptr,  # float64 [1]: β · slack, where RULE is PER_ROW
    limit_ptr,  # int32 [R]: PER_ROW: how many stay, −1 where the rule says; THRESHOLD: ties kept
    out_ptr,  # uint8: room for the records
    table_ptr,  # int64 [R, 3], written
    stats_ptr,  # float64 [R, 3], written
    fault_ptr,  # int32 [R], written: 0, NOT_FINITE or DOUBTFUL
    told_ptr,  # int64 [R], all zero: what each row has told those after it
    ticket_ptr,  # int64 [1], zero: the next row that is given out
    scratch_ptr,  # of w's dtype: for each program one of no use, and C rounded up to tiles
    mask_ptr,  # uint8: for each program a mask, `mask_stride` apart
    binades_ptr,  # int32: for each program 256
    rows,
    threshold,
    row_stride,
    scratch_stride,
    mask_stride,
    RULE: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    INFINITY: tl.constexpr,
    MANTISSA: tl.constexpr,
    SCALE: tl.constexpr,
    SIGN: tl.constexpr,
    ITEM: tl.constexpr,
    DROPPED: tl.constexpr,
    STORED: tl.constexpr,
    RADIX: tl.constexpr,
    DIGITS: tl.constexpr,
    LIMIT: tl.constexpr,
    ALIGN: tl.constexpr,
    EMIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Pack all rows; see the module."""
    MASK_BYTES: tl.constexpr = (COLUMNS + 7) // 8
    MASK_LENGTH: tl.constexpr = (MASK_BYTES + ALIGN - 1) // ALIGN * ALIGN
    kept_ptr = scratch_ptr + 8 + tl.program_id(0).to(tl.int64) * scratch_stride
    own_binades_ptr = binades_ptr + tl.program_id(0) * 256
    own_mask_ptr = mask_ptr + tl.program_id(0).to(tl.int64) * mask_stride
    guess = tl.full([], 0, tl.int32)
    row = tl.atomic_add(ticket_ptr, 1)
    while row < rows:
        row_ptr = w_ptr + row.to(tl.int64) * row_stride
        given_row_ptr = given_ptr + row.to(tl.int64) * MASK_BYTES
        k, cut, end, s1, s2, fault = decide_row(
            row_ptr,
            beta_ptr,
            limit_ptr + row,
            threshold,
            guess,
            RULE,
            COLUMNS,
            KEY_MASK,
            INFINITY,
            MANTISSA,
            SCALE,
            TILE,
        )
        guess = cut
        smallest = tl.full([], 0, tl.int32)
        if k != 0:
            k, smallest = _compress_row(
                row_ptr,
                given_row_ptr,
                kept_ptr - 1,
                own_mask_ptr,
                cut,
                end,
                RULE,
                COLUMNS,
                KEY_MASK,
                TILE,
            )
        tl.debug_barrier()  # the scratch is written, and will be read by other threads
        base = tl.where(k > 0, smallest >> DROPPED, 0)
        escaped, mass = _look_over(
            kept_ptr, k, base, KEY_MASK, MANTISSA, SCALE, DROPPED, LIMIT, TILE
        )
        if escaped * 64 > k:
            base += _fullest_binades(
                kept_ptr, own_binades_ptr, k, base, KEY_MASK, DROPPED, STORED, RADIX, TILE
            )
            escaped, _ = _look_over(
                kept_ptr, k, base, KEY_MASK, MANTISSA, SCALE, DROPPED, LIMIT, TILE
            )
        tl.store(table_ptr + row.to(tl.int64) * 3, k.to(tl.int64))
        tl.store(table_ptr + row.to(tl.int64) * 3 + 1, escaped.to(tl.int64))
        tl.store(table_ptr + row.to(tl.int64) * 3 + 2, base.to(tl.int64))
        tl.store(stats_ptr + row.to(tl.int64) * 3, s1)
        tl.store(stats_ptr + row.to(tl.int64) * 3 + 1, s2)
        tl.store(stats_ptr + row.to(tl.int64) * 3 + 2, mass)
        tl.store(fault_ptr + row, fault)
        if EMIT:
            mask_length = tl.where((k > 0) & (k < COLUMNS), MASK_LENGTH, 0)
            value_length = _padded(((k.to(tl.int64) * (STORED + 1) + 7) // 8).to(tl.int32), ALIGN)
            code_length = k * 0
            if DIGITS > 0:
                code_length = _padded((k + DIGITS - 1) // DIGITS, ALIGN)
            escape_length = _padded(escaped * ITEM, ALIGN)
            nbytes = (mask_length + value_length).to(tl.int64) + code_length + escape_length
            at = out_ptr + tl.multiple_of(begin_record(told_ptr, row, nbytes), ALIGN)
            _write_mask(own_mask_ptr, at, mask_length, COLUMNS, TILE)
            at += mask_length
            _write_values(
                kept_ptr,
                at,
                k,
                base,
                value_length,
                KEY_MASK,
                SIGN,
                DROPPED,
                STORED,
                LIMIT,
                TILE,
            )
            at += value_length
            if DIGITS > 0:
                _write_codes(
                    kept_ptr,
                    at,
                    k,
                    base,
                    code_length,
                    KEY_MASK,
                    DROPPED,
                    STORED,
                    LIMIT,
                    RADIX,
                    DIGITS,
                    TILE // 2,  # each byte stands for DIGITS weights
                )
                at += code_length
            if escaped > 0:
                _write_escapes(
                    kept_ptr,
                    at,
                    k,
                    base,
                    escaped,
                    escape_length,
                    KEY_MASK,
                    DROPPED,
                    LIMIT,
                    ITEM,
                    ALIGN,
                    TILE,
                )
        tl.debug_barrier()  # the scratch is read, and will be written again
        row = tl.atomic_add(ticket_ptr, 1)
