"""Packed records to rows of weights on a device, every claim of the record checked on the way.

Legend as in `emp_kernels.gpu`; a chunk is eight columns, one byte of the mask: N chunks a tile.
A weight's rank j is how many of its row are kept before it: it tells where its parts lie.
"""

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from emp_kernels import numba_backend
from emp_kernels.device_workspace import DeviceWorkspace
from emp_kernels.errors import DamagedRowError
from emp_kernels.gpu.common import tile_of
from emp_kernels.layout import RowLayout
from emp_kernels.rows import Bytes, Table, Workspace

__all__ = ["UnpackLaunch", "unpack", "upload_records"]

_LARGEST_TILE = 256
"""Of one warp: its scans need no barrier, and most tiles have no escape or one digit only."""

_LINE = tl.constexpr(7)
"""Numbers of a row that the kernel takes: kept, escaped, base, and where its sections start."""

_SLACK = 32
"""Bytes past the records that may be read with the last ones of them."""


@triton.jit
def _spread(byte):
    """The bits of a byte, each in four bits of a uint32 of its own."""
    bits = (byte | (byte << 12)) & 0x000F000F
    bits = (bits | (bits << 6)) & 0x03030303
    return (bits | (bits << 3)) & 0x11111111


@triton.jit
def _before(sums, column):
    """Of sums in four bits each, up to and with a column: eight times the one before it."""
    shift = tl.maximum(column * 4 - 7, 0).to(tl.uint32)
    kept = tl.where(column == 0, 0, 0x78).to(tl.uint32)
    return tl.where(column == 1, sums << 3, sums >> shift) & kept


@triton.jit
def _word(words, at, index, wanted, BITS: tl.constexpr, ALIGN: tl.constexpr):
    """Addresses of words, and the bits in them where integers of BITS bits begin.

    Args:
        words: Pointer to all.
        at: Where the integers begin, a byte and a multiple of ALIGN.
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
    return words + (at >> 2) + word, bit.to(tl.uint64)


@triton.jit
def _load(word, wanted):
    return tl.load(word, mask=wanted).to(tl.uint32, bitcast=True).to(tl.uint64)


@triton.jit
def _window(words, at, index, wanted, ALIGN: tl.constexpr):
    """Eight bytes from byte `at` + index on, as uint64; anything where they are not wanted."""
    word, bit = _word(words, at, index, wanted, 8, ALIGN)
    middle = _load(word + 1, wanted)
    low = (((middle << 32) | _load(word, wanted)) >> bit).to(tl.uint32).to(tl.uint64)
    high = (((_load(word + 2, wanted) << 32) | middle) >> bit).to(tl.uint32).to(tl.uint64)
    return (high << 32) | low


@triton.jit
def _integers(words, at, index, wanted, BITS: tl.constexpr, ALIGN: tl.constexpr):
    """Integers of BITS bits and what follows them; anything where they are not wanted."""
    word, bit = _word(words, at, index, wanted, BITS, ALIGN)
    return (((_load(word + 1, wanted) << 32) | _load(word, wanted)) >> bit).to(tl.uint32)


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
def _next_place(place, RADIX: tl.constexpr, DIGIT_BITS: tl.constexpr):
    """The place of the digit above the one whose place this is."""
    return place + DIGIT_BITS if DIGIT_BITS > 0 else (place + (RADIX - 1)) // RADIX


@triton.jit
def _escapes(payload, at, rank, wanted, ITEM_BYTES: tl.constexpr):
    """Whole weights, which may start at any byte, uint32; 0 where they are not wanted."""
    start = payload + at + rank * ITEM_BYTES
    bits = tl.load(start, mask=wanted, other=0).to(tl.uint32)
    for i in tl.static_range(1, ITEM_BYTES):
        bits |= tl.load(start + i, mask=wanted, other=0).to(tl.uint32) << (8 * i)
    return bits


@triton.jit
def _unpack_row(
    payload,
    words,
    lines,
    out,
    faults,
    columns,
    row_stride,
    BITS: tl.constexpr,
    INFINITY: tl.constexpr,
    DROPPED: tl.constexpr,
    STORED: tl.constexpr,
    RADIX: tl.constexpr,
    DIGITS: tl.constexpr,
    DIGIT_BITS: tl.constexpr,
    LOWEST: tl.constexpr,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
):
    """Decode the record of the program's row; faults[row] is 0 if nothing contradicts its line."""
    N: tl.constexpr = TILE // 8
    LIMIT: tl.constexpr = (RADIX << STORED) - 1  # the largest distance there can be
    KEY_MASK: tl.constexpr = (1 << (BITS - 1)) - 1
    ITEM_BYTES: tl.constexpr = BITS // 8
    row = tl.program_id(0).to(tl.int64)
    line = lines + row * _LINE
    k = tl.load(line).to(tl.int32)
    escaped = tl.load(line + 1).to(tl.int32)
    base = tl.load(line + 2).to(tl.uint32)
    mask_at = tl.multiple_of(tl.load(line + 3), ALIGN)
    values_at = tl.multiple_of(tl.load(line + 4), ALIGN)
    codes_at = tl.multiple_of(tl.load(line + 5), ALIGN)
    escapes_at = tl.multiple_of(tl.load(line + 6), ALIGN)
    masked = tl.where((k > 0) & (k < columns), columns, 0)  # columns that the mask tells of
    last = tl.load(payload + mask_at + masked // 8, mask=masked % 8 > 0, other=0).to(tl.int32)
    bad = (last >> (masked % 8)) != 0
    reaches_infinity = base + LIMIT > (INFINITY >> DROPPED)

    chunk_N = tl.arange(0, N)
    column_8N = tl.arange(0, 8)[:, None]
    bit_8N = (1 << (column_8N * 4)).to(tl.uint32)
    named = k * 0
    marked = k * 0
    largest_N = tl.zeros([N], tl.uint32)
    # from rank `turned` on, codes are digit `turn` of byte after byte, then the next digit of them
    code_bytes = (k + DIGITS - 1) // DIGITS if DIGITS else k
    turn = k * 0
    turned = k * 0
    place = base * 0 + LOWEST
    for start in range(0, columns, TILE):
        at_N = start // 8 + chunk_N
        byte_N = tl.load(payload + mask_at + at_N, mask=at_N * 8 < masked, other=0).to(tl.uint32)
        if k == columns:
            byte_N = ((1 << tl.minimum(tl.maximum(k - at_N * 8, 0), 8)) - 1).to(tl.uint32)
        bits_N = _spread(byte_N)
        sums_N = bits_N * 0x11111111  # in each four bits, how many are kept up to there
        count_N = (sums_N >> 28).to(tl.int32)
        rank_N = named + tl.cumsum(count_N, 0) - count_N
        named += tl.sum(count_N, 0)
        bits_N = tl.where(named <= k, bits_N, 0)
        some_N = bits_N != 0

        before_8N = _before(sums_N[None, :], column_8N)
        if STORED == 7:
            bytes_N = _window(words, values_at, rank_N, some_N, ALIGN)
            value_8N = (bytes_N[None, :] >> before_8N.to(tl.uint64)).to(tl.uint32)
        else:
            rank_8N = rank_N[None, :] + (before_8N >> 3).to(tl.int32)
            value_8N = _integers(words, values_at, rank_8N, some_N[None, :], STORED + 1, ALIGN)
        away_8N = value_8N & ((1 << STORED) - 1)
        if DIGITS > 0:
            if (named <= turned + code_bytes) | (turn == DIGITS - 1):
                bytes_N = _window(words, codes_at, rank_N - turned, some_N, ALIGN)
                byte_8N = (bytes_N[None, :] >> before_8N.to(tl.uint64)).to(tl.uint32) & 255
                code_8N = _digit(byte_8N, place, RADIX, DIGIT_BITS)
            else:
                rank_8N = rank_N[None, :] + (before_8N >> 3).to(tl.int32)
                turned_8N = rank_8N * 0 + turned
                place_8N = (rank_8N * 0).to(tl.uint32) + place
                while (turn < DIGITS - 1) & (turned + code_bytes < named):
                    turn += 1
                    turned += code_bytes
                    place = _next_place(place, RADIX, DIGIT_BITS)
                    above_8N = rank_8N >= turned
                    turned_8N = tl.where(above_8N, turned, turned_8N)
                    place_8N = tl.where(above_8N, place, place_8N)
                at_8N = codes_at + (rank_8N - turned_8N)
                byte_8N = tl.load(payload + at_8N, mask=some_N[None, :]).to(tl.uint32)
                code_8N = _digit(byte_8N, place_8N, RADIX, DIGIT_BITS)
            away_8N += code_8N << STORED
        key_8N = (base + away_8N) << DROPPED
        keep_8N = (bits_N[None, :] & bit_8N) != 0
        if reaches_infinity:
            in_window_8N = tl.where(keep_8N & (away_8N != LIMIT), key_8N, 0)
            largest_N = tl.maximum(largest_N, tl.max(in_window_8N, 0))
        weight_8N = tl.where(keep_8N, key_8N | ((value_8N >> STORED) << (BITS - 1)), 0)

        # columns that go may show one, too: they were given what the next one that stays has
        if tl.max(tl.max(away_8N, 0), 0) == LIMIT:
            left_N = tl.sum(tl.where(away_8N == LIMIT, bit_8N & bits_N[None, :], 0), 0)
            count_N = ((left_N * 0x11111111) >> 28).to(tl.int32)
            nth_N = marked + tl.cumsum(count_N, 0) - count_N
            marked += tl.sum(count_N, 0)
            for _ in range(tl.max(count_N, 0)):  # each chunk's first escape, then its second, ...
                first_N = left_N & (0 - left_N)
                stored_N = (left_N != 0) & (nth_N < escaped)
                whole_N = _escapes(payload, escapes_at, nth_N, stored_N, ITEM_BYTES)
                largest_N = tl.maximum(largest_N, whole_N & KEY_MASK)
                weight_8N = tl.where(first_N[None, :] == bit_8N, whole_N[None, :], weight_8N)
                left_N ^= first_N
                nth_N += 1

        column_N8 = start + chunk_N[:, None] * 8 + tl.arange(0, 8)[None, :]
        there_N8 = out + row * row_stride + column_N8
        weight_N8 = tl.trans(weight_8N.to(out.dtype.element_ty))
        tl.store(there_N8, weight_N8, mask=column_N8 < columns)
    bad |= (named != k) | (marked != escaped) | (tl.max(largest_N, 0) >= INFINITY)
    tl.store(faults + row, bad.to(tl.uint8))


def upload_records(payload: Bytes, workspace: DeviceWorkspace) -> torch.Tensor:
    """A block's records on the device, as `unpack` takes them.

    Args:
        payload: uint8 [bytes], C-contiguous; not to be changed before the stream is waited for.
        workspace: The records lie in its buffer; its stream must be the active one.
    """
    whole_words = workspace.on_device("records", -(-(payload.size + _SLACK) // 4) * 4)
    workspace.upload("records", payload)
    return whole_words


class UnpackLaunch:
    """The kernel that decodes packed rows; arguments as for `unpack`.

    Attributes:
        starts: int64 [4 · R + 1], where the sections of each record begin, and the end.
        faults: uint8 [R], once it has run: 0 where nothing contradicts the row's line.
    """

    def __init__(
        self,
        payload: torch.Tensor,
        table: Table,
        layout: RowLayout,
        out: torch.Tensor,
        workspace: DeviceWorkspace,
        *,
        tile: int | None = None,
    ) -> None:
        rows, columns = out.shape
        sections = layout.sections(table[:, 0], table[:, 1])
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sections.ravel())])
        if payload.numel() < self.starts[-1] + _SLACK:
            needed = f"for records of {self.starts[-1]} and {_SLACK}"
            raise ValueError(f"{payload.numel()} bytes of payload, {needed}")
        lines = np.concatenate([table, self.starts[:-1].reshape(rows, 4)], axis=1)
        self.faults = workspace.on_device("faults", rows)
        self._lines = workspace.upload("lines", lines).view(torch.int64)
        self._payload = payload
        self._layout = layout
        self._out = self._dense = out
        if out.stride(1) != 1:  # weight by weight, each would be written to a sector of its own
            nbytes = rows * columns * layout.number_format.item_bytes
            self._dense = workspace.on_device("dense", nbytes).view(out.dtype).view(rows, columns)
        self._tile = tile or tile_of(columns, _LARGEST_TILE)

    def __call__(self) -> None:
        """Put it on the stream."""
        rows, columns = self._out.shape
        if not rows:
            return
        layout = self._layout
        power_of_two = layout.radix.bit_count() == 1
        _unpack_row[(rows,)](
            self._payload,
            self._payload.view(torch.int32),
            self._lines,
            self._dense,
            self.faults,
            columns,
            self._dense.stride(0),
            BITS=layout.number_format.bits,
            INFINITY=layout.number_format.infinity,
            DROPPED=layout.dropped_bits,
            STORED=layout.stored_bits,
            RADIX=layout.radix,
            DIGITS=layout.digits,
            DIGIT_BITS=layout.radix.bit_length() - 1 if power_of_two else 0,
            LOWEST=0 if power_of_two else -(-(1 << 24) // layout.radix),
            ALIGN=layout.align,
            TILE=self._tile,
            num_warps=1,
            enable_fp_fusion=True,
        )
        if self._dense is not self._out:
            self._out.copy_(self._dense)


def unpack(
    payload: torch.Tensor,
    table: Table,
    layout: RowLayout,
    out: torch.Tensor,
    workspace: DeviceWorkspace,
    *,
    tile: int | None = None,
) -> None:
    """Decode a block of packed rows on the device where they lie; returns when it is done.

    Args:
        payload: uint8, of `upload_records`: the block's records, one after the other, and at
            least 32 bytes that are not used.
        table: int64 [R, 3], their lines of the row table, each one that
            `emp_kernels.dispatch.check_table` lets pass.
        layout: The tensor's layout.
        out: int16 or int32 [R, C], of any strides, written. What it holds is unspecified where a
            record is damaged.
        workspace: Of the device; its stream must be the active one.
        tile: Columns handled at a time, a power of two from 16; chosen if None.

    Raises:
        DamagedRowError: If a record contradicts its line of the table or itself.
        ValueError: If the payload is shorter than the table tells.
    """
    launch = UnpackLaunch(payload, table, layout, out, workspace, tile=tile)
    launch()
    found = workspace.download("faults", launch.faults)
    workspace.wait()
    if found.any():
        row = int(np.argmax(found))
        start, stop = launch.starts[4 * row], launch.starts[4 * row + 4]
        _refuse(payload[start:stop].cpu().numpy(), table[row], layout, row)


def _refuse(record: npt.NDArray[np.uint8], line: Table, layout: RowLayout, row: int) -> None:
    """Say what is wrong with a row, as the CPU's kernel finds it.

    Raises:
        DamagedRowError: Always.
    """
    table = line.reshape(1, 3)
    out = np.empty((1, layout.columns), layout.number_format.storage)
    sections = layout.sections(table[:, 0], table[:, 1])
    try:
        numba_backend.unpack(record, sections, table, layout, out, False, Workspace())
    except DamagedRowError as error:
        raise DamagedRowError(row, error.fault) from None
    raise AssertionError(f"row {row} is damaged on the device alone")
