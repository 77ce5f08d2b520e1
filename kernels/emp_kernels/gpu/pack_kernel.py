"""The kernel that packs rows of weights on a GPU; it reads each weight once.

A program takes rows by number, one after the other. Of each row it finds out what stays, and
thereby the window; writes what the record has of each kept weight to scratch memory of its own,
which stays in the caches; learns where its record begins (see
`emp_kernels.gpu.look_back`); and puts the record together there.

`tl.debug_barrier` is the only barrier between a program's threads that Triton offers: it is needed
where memory that some threads wrote is read by others, which Triton does not see.
"""

import triton
import triton.language as tl

from emp_kernels.gpu.common import power_of_two, unscaled_magnitudes
from emp_kernels.gpu.decide import PER_ROW, decide_row, first_guess, tile_keeps
from emp_kernels.gpu.look_back import begin_record
from emp_kernels.gpu.pack_sections import write_codes, write_escapes, write_mask, write_values

__all__ = ["pack_kernel"]


@triton.jit
def _distances(key, base, DROPPED: tl.constexpr, LIMIT: tl.constexpr):
    """How far keys lie above the window's base; LIMIT where they escape."""
    # unsigned, keys below the base wrap to very large distances: one comparison for both sides
    away = ((key >> DROPPED) - base).to(tl.uint32, bitcast=True)
    distance = tl.minimum(away, LIMIT).to(tl.int32, bitcast=True)
    if DROPPED > 0:
        distance = tl.where((key & ((1 << DROPPED) - 1)) == 0, distance, LIMIT)
    return distance


@triton.jit
def _least_kept(
    row_ptr,
    given_ptr,
    cut,
    end,
    RULE: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    TILE: tl.constexpr,
):
    """How many weights of a row stay, and the least key of these."""
    N: tl.constexpr = TILE // 8
    kept_N = tl.zeros([N], tl.int32)
    least_N = tl.full([N], KEY_MASK, tl.int32)
    for start in range(0, COLUMNS, TILE):
        _, key_8N, keep_8N = tile_keeps(
            row_ptr, given_ptr, start, cut, end, RULE, COLUMNS, KEY_MASK, TILE
        )
        kept_N += tl.sum(keep_8N, 0)
        least_N = tl.minimum(least_N, tl.min(tl.where(keep_8N != 0, key_8N, KEY_MASK), 0))
    return tl.sum(kept_N, 0), tl.min(least_N, 0)


@triton.jit
def _compress_row(
    row_ptr,
    given_ptr,
    item_ptr,
    escape_ptr,
    mask_ptr,
    cut,
    end,
    base,
    RULE: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    MANTISSA: tl.constexpr,
    SCALE: tl.constexpr,
    SIGN: tl.constexpr,
    DROPPED: tl.constexpr,
    STORED: tl.constexpr,
    LIMIT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write what a row's record is made of to scratch memory.

    Args:
        item_ptr: uint16 or uint32 [k], written: of each kept weight its value, and above that its
            code.
        escape_ptr: int32, written: the columns of those that escape.
        mask_ptr: uint8 [⌈C/8⌉], written.
        base: Where the window begins.

    Returns:
        (how many escape, Σ magnitudes of the kept ones).
    """
    N: tl.constexpr = TILE // 8
    column_81 = tl.arange(0, 8)[:, None]
    byte_N = tl.arange(0, N)
    kept = tl.full([], 0, tl.int32)
    escaped = tl.full([], 0, tl.int32)
    mass_N = tl.zeros([N], tl.float64)
    for start in range(0, COLUMNS, TILE):
        pattern_8N, key_8N, keep_8N = tile_keeps(
            row_ptr, given_ptr, start, cut, end, RULE, COLUMNS, KEY_MASK, TILE
        )
        mass_N += tl.sum(unscaled_magnitudes(tl.where(keep_8N != 0, key_8N, 0), MANTISSA), 0)
        away_8N = _distances(key_8N, base, DROPPED, LIMIT)
        code_8N = away_8N + (away_8N & -(1 << STORED))  # with room for the sign below the code
        sign_8N = (pattern_8N.to(tl.int32) >> (SIGN - STORED)) & (1 << STORED)
        item_8N = code_8N | sign_8N
        # One sum over each chunk of eight gives four results, for no field can overflow: mask bits
        # (0 to 7), escape bits (8 to 15), weights kept (16 to 19), escapes (20 to 23).
        escape: tl.constexpr = LIMIT + (LIMIT & -(1 << STORED))
        kept_81 = (1 << column_81) + 0x10000
        escaped_81 = (0x101 << column_81) + 0x110000
        one_8N = tl.where(code_8N == escape, escaped_81, kept_81)
        chunk_N = tl.sum(tl.where(keep_8N != 0, one_8N, 0), 0)
        # Likewise one scan over the tile counts both: kept weights below bit 16, escapes above.
        count_N = ((chunk_N >> 16) & 15) + (chunk_N >> 20 << 16)
        before_N = tl.cumsum(count_N, 0) - count_N
        rank_N = (before_N & 0xFFFF) + kept
        rank_8N = tl.cumsum(keep_8N, 0) - keep_8N
        at_8N = (item_ptr + rank_N)[None, :] + rank_8N
        kept_8N = (chunk_N[None, :] & (1 << column_81)) != 0  # so one register holds them till here
        tl.store(at_8N, item_8N.to(item_ptr.dtype.element_ty), mask=kept_8N)
        mask_at_N = mask_ptr + start // 8 + byte_N
        if COLUMNS % TILE == 0:
            tl.store(mask_at_N, chunk_N.to(tl.uint8))
        else:
            tl.store(mask_at_N, chunk_N.to(tl.uint8), mask=start + byte_N * 8 < COLUMNS)
        counts = tl.sum(count_N, 0)
        if counts >> 16 > 0:  # more than half of the tiles have no escape
            _list_escapes(escape_ptr + escaped, before_N >> 16, (chunk_N >> 8) & 255, start, TILE)
        kept += counts & 0xFFFF
        escaped += counts >> 16
    return escaped, tl.sum(mass_N, 0) * power_of_two(SCALE)


@triton.jit
def _bits_set(bits):
    """How many bits of an int32 are set: Triton has no function for it."""
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    return (((bits + (bits >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def _list_escapes(list_ptr, place_N, escape_N, start, TILE: tl.constexpr):
    """Write the columns of a tile's escapes: each chunk's first one, then its second, ..."""
    chunk_N = start + tl.arange(0, TILE // 8) * 8
    while tl.max(escape_N, 0) > 0:
        below_N = (escape_N & (0 - escape_N)) - 1
        tl.store(list_ptr + place_N, chunk_N + _bits_set(below_N), mask=escape_N != 0)
        escape_N = escape_N & (escape_N - 1)
        place_N += 1


@triton.jit
def _fullest_binades(
    row_ptr,
    given_ptr,
    binades_ptr,
    cut,
    end,
    base,
    RULE: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEY_MASK: tl.constexpr,
    DROPPED: tl.constexpr,
    STORED: tl.constexpr,
    RADIX: tl.constexpr,
    TILE: tl.constexpr,
):
    """How far above the base the first of the fullest windows of RADIX binades begins."""
    count_B = tl.zeros([256], tl.int32)
    for start in range(0, COLUMNS, TILE):
        _, key_8N, keep_8N = tile_keeps(
            row_ptr, given_ptr, start, cut, end, RULE, COLUMNS, KEY_MASK, TILE
        )
        binade_8N = tl.where(keep_8N != 0, ((key_8N >> DROPPED) - base) >> STORED, -1)
        binade_T = tl.reshape(binade_8N, (TILE,))
        count_B += tl.histogram(binade_T, 256, mask=binade_T >= 0)
    binade_B = tl.arange(0, 256)
    tl.store(binades_ptr + binade_B, count_B)
    tl.debug_barrier()  # a count is read by other threads than the one that wrote it
    inside_B = tl.zeros([256], tl.int32)
    for i in tl.static_range(RADIX):
        within_B = binade_B + i < 256
        inside_B += tl.load(binades_ptr + binade_B + i, mask=within_B, other=0)
    inside_B = tl.where(binade_B <= 256 - RADIX, inside_B, -1)
    tl.debug_barrier()  # the caller writes items to scratch memory again, by other threads
    return tl.argmax(inside_B, 0) << STORED


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
    state_ptr,  # int64 [R], all zero: what each row publishes
    ticket_ptr,  # int64 [1], zero: the next row to be given out
    scratch_ptr,  # of w's dtype: for each program C items, ZEROS zeros, C int32
    mask_ptr,  # uint8: for each program a mask, `mask_stride` apart
    binades_ptr,  # int32: for each program 256
    rows,
    threshold,
    row_stride,
    escapes_at,
    scratch_stride,
    mask_stride,
    RULE: tl.constexpr,
    WITH_WINDOW: tl.constexpr,
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
    ZEROS: tl.constexpr,
    EMIT: tl.constexpr,
    LOOK_BACK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Pack all rows; see the module."""
    MASK_BYTES: tl.constexpr = (COLUMNS + 7) // 8
    MASK_LENGTH: tl.constexpr = (MASK_BYTES + ALIGN - 1) // ALIGN * ALIGN
    program = tl.program_id(0).to(tl.int64)
    own_scratch_ptr = scratch_ptr + program * scratch_stride
    item_ptr = own_scratch_ptr.to(tl.pointer_type(tl.uint16 if ITEM == 2 else tl.uint32))
    escape_ptr = (own_scratch_ptr + escapes_at).to(tl.pointer_type(tl.int32))
    own_binades_ptr = binades_ptr + program * 256
    own_mask_ptr = mask_ptr + program * mask_stride
    row = tl.atomic_add(ticket_ptr, 1)
    guess = first_guess(w_ptr, row, rows, row_stride, RULE, COLUMNS, KEY_MASK, MANTISSA, TILE)
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
            WITH_WINDOW,
            COLUMNS,
            KEY_MASK,
            INFINITY,
            MANTISSA,
            SCALE,
            TILE,
        )
        tl.store(stats_ptr + row.to(tl.int64) * 3, s1)
        tl.store(stats_ptr + row.to(tl.int64) * 3 + 1, s2)
        tl.store(fault_ptr + row, fault)
        guess = cut  # rows of one matrix have thresholds that are near each other
        smallest = tl.full([], 0, tl.int32) + cut
        if RULE != PER_ROW:
            if k != 0:
                k, smallest = _least_kept(
                    row_ptr, given_row_ptr, cut, end, RULE, COLUMNS, KEY_MASK, TILE
                )
        base = tl.where(k > 0, smallest >> DROPPED, 0)
        escaped = tl.full([], 0, tl.int32)
        mass = tl.full([], 0, tl.float64)
        # At most two turns: a second one, from another base, where more than one weight in 64
        # escapes. A loop, for the code of _compress_row would stand in the kernel twice otherwise.
        turn = tl.where(k > 0, 0, 2)
        while turn < 2:
            escaped, mass = _compress_row(
                row_ptr,
                given_row_ptr,
                item_ptr,
                escape_ptr,
                own_mask_ptr,
                cut,
                end,
                base,
                RULE,
                COLUMNS,
                KEY_MASK,
                MANTISSA,
                SCALE,
                SIGN,
                DROPPED,
                STORED,
                LIMIT,
                TILE,
            )
            turn += 2
            if (turn == 2) & (escaped * 64 > k):
                base += _fullest_binades(
                    row_ptr,
                    given_row_ptr,
                    own_binades_ptr,
                    cut,
                    end,
                    base,
                    RULE,
                    COLUMNS,
                    KEY_MASK,
                    DROPPED,
                    STORED,
                    RADIX,
                    TILE,
                )
                turn = tl.full([], 1, tl.int32)
        tl.store(table_ptr + row.to(tl.int64) * 3, k.to(tl.int64))
        tl.store(table_ptr + row.to(tl.int64) * 3 + 1, escaped.to(tl.int64))
        tl.store(table_ptr + row.to(tl.int64) * 3 + 2, base.to(tl.int64))
        tl.store(stats_ptr + row.to(tl.int64) * 3 + 2, mass)
        if EMIT:
            # the units that a section of values is written in may reach past the last item
            zero_Z = tl.zeros([ZEROS], tl.int32).to(item_ptr.dtype.element_ty)
            tl.store(item_ptr + k + tl.arange(0, ZEROS), zero_Z)
            mask_length = tl.where((k > 0) & (k < COLUMNS), MASK_LENGTH, 0)
            value_length = _padded(((k.to(tl.int64) * (STORED + 1) + 7) // 8).to(tl.int32), ALIGN)
            code_length = k * 0
            if DIGITS > 0:
                code_length = _padded((k + DIGITS - 1) // DIGITS, ALIGN)
            escape_length = _padded(escaped * ITEM, ALIGN)
            nbytes = (mask_length + value_length).to(tl.int64) + code_length + escape_length
            begin = begin_record(state_ptr, row, nbytes, LOOK_BACK)
            at = out_ptr + begin // ALIGN * ALIGN  # no change, but Triton learns of the alignment
            tl.debug_barrier()  # scratch memory is read by other threads than those that wrote it
            write_mask(own_mask_ptr, at, mask_length, COLUMNS, TILE)
            at += mask_length
            write_values(
                item_ptr, at, value_length, STORED + 1, ALIGN, TILE if STORED == 7 else TILE // 2
            )
            at += value_length
            if DIGITS > 0:
                write_codes(
                    item_ptr, at, k, code_length, STORED + 1, RADIX, DIGITS, TILE // 2
                )  # each byte stands for DIGITS weights
                at += code_length
            if escaped > 0:
                write_escapes(
                    row_ptr, escape_ptr, at, escaped, escape_length, ITEM, ALIGN, TILE // 4
                )
            tl.debug_barrier()  # all have read it before the next row is written to it
        row = tl.atomic_add(ticket_ptr, 1)
