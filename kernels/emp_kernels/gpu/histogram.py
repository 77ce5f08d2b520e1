"""Count bit patterns on a device, for `emp_kernels.histogram`.

Weights are flat here: which row they belong to matters to `count_equal_rows` only. Of P programs,
each takes every P-th tile of them. Results lie in buffers of the workspace, or are new tensors; all
are exact integers, so neither the order of the atomic additions nor the way they are spread
matters.

Legend: W bins of the window; T weights of a tile.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from emp_kernels.gpu.common import COUNTS_IN_SHARED_MEMORY, tile_of
from emp_kernels.gpu_workspace import DeviceWorkspace
from emp_kernels.numbers import BINS, F32, LOW_PARTS, NumberFormat

__all__ = ["Spread", "count_bins", "count_equal_rows", "count_keys", "count_low_parts"]

_COPIES = 16
"""Half of all Gaussian weights fall into the bins of one or two binades. Their counts are 4 to 8
lines of the L2 cache, and a line is added to at one place in it, so that programs would wait for
each other there. This many copies spread over all slices of an H200's L2."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How counting is spread over a device.

    Attributes:
        programs: How many work at the same time.
        tile: Weights that one looks at together, a power of two.
        warps: Of each program.
        copies: Of the counts in the device's memory: programs add to copy number p mod copies, so
            that fewer of them meet at one address.
        window: First bin and number of bins, a power of two, of those that `tl.histogram` counts in
            shared memory; None where all go to the device's memory one by one.
    """

    programs: int
    tile: int
    warps: int = 4
    copies: int = _COPIES
    window: tuple[int, int] | None = None

    @classmethod
    def over(cls, device: torch.device, weights: int, number_format: NumberFormat) -> "Spread":
        """What suits a device, for so many weights."""
        # The registers of a program must hold the window's counts and a tile. The window holds
        # magnitudes below 2: of fp16 all of them, of the others those from 2**-31 on.
        tile, warps, window = {
            "BF16": (4096, 8, (0x3000, 1 << 12)),
            "F16": (4096, 16, (0, 1 << 14)),
            "F32": (2048, 8, (0x3000, 1 << 12)),
        }[number_format.name]
        processors = 1
        if device.type == "cuda":
            processors = torch.cuda.get_device_properties(device).multi_processor_count
        return cls(
            programs=max(min(processors * 16 // warps, -(-weights // tile)), 1),
            tile=tile,
            warps=warps,
            window=window if COUNTS_IN_SHARED_MEMORY else None,
        )


@triton.jit
def _load_keys(w_ptr, tile, n, KEY_MASK: tl.constexpr, TILE: tl.constexpr):
    """Load a tile's keys, int32, and which of them there are: the last tile is not full."""
    start = tl.full([], TILE, tl.int64) * tile
    lane_T = tl.arange(0, TILE)
    inside_T = lane_T < tl.minimum(n - start, TILE).to(tl.int32)
    pattern_T = tl.load(w_ptr + start + lane_T, mask=inside_T, other=0)
    return (pattern_T & KEY_MASK).to(tl.int32), inside_T


@triton.jit
def _count_bins(
    w_ptr,
    counts_ptr,
    sums_ptr,
    squares_ptr,
    n,
    KEY_MASK: tl.constexpr,
    LOW_BITS: tl.constexpr,
    BINS: tl.constexpr,
    COPIES: tl.constexpr,
    FIRST: tl.constexpr,
    WINDOW: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add to a copy of the counts, of all bins but the first.

    Pruned weights are zeros, often more than half: their additions would all wait for one address.
    So bin 0 is not counted, but is what the other bins lack of all weights. Where there are low
    bits, their sums and the sums of their squares are added up too.
    """
    program = tl.program_id(0)
    copy = program % COPIES * BINS
    bin_W = FIRST + tl.arange(0, WINDOW)
    count_W = tl.zeros([WINDOW], tl.int32)
    for tile in range(program, tl.cdiv(n, TILE), tl.num_programs(0)):
        key_T, inside_T = _load_keys(w_ptr, tile, n, KEY_MASK, TILE)
        bin_T = key_T >> LOW_BITS
        counted_T = inside_T & (bin_T != 0)
        if WINDOW > 1:
            near_T = counted_T & (bin_T >= FIRST) & (bin_T < FIRST + WINDOW)
            count_W += tl.histogram(bin_T - FIRST, WINDOW, mask=near_T)
            counted_T = counted_T & (near_T == 0)
        if tl.max(counted_T.to(tl.int32), 0) > 0:
            tl.atomic_add(counts_ptr + copy + bin_T, 1, mask=counted_T, sem="relaxed")
        if LOW_BITS:
            low_T = (key_T & ((1 << LOW_BITS) - 1)).to(tl.int64)
            some_T = inside_T & (low_T != 0)
            tl.atomic_add(sums_ptr + copy + bin_T, low_T, mask=some_T, sem="relaxed")
            tl.atomic_add(squares_ptr + copy + bin_T, low_T * low_T, mask=some_T, sem="relaxed")
    if WINDOW > 1:
        tl.atomic_add(counts_ptr + copy + bin_W, count_W, mask=count_W != 0, sem="relaxed")


@triton.jit(do_not_specialize=["chosen_bin"])
def _count_low_parts(
    w_ptr,
    counts_ptr,
    chosen_bin,
    n,
    KEY_MASK: tl.constexpr,
    LOW_PARTS: tl.constexpr,
    COPIES: tl.constexpr,
    TILE: tl.constexpr,
):
    """Add the low parts in one bin to a copy of the counts.

    Low parts of zero, which may be very many, are counted in registers and added at the end.
    """
    program = tl.program_id(0)
    copy = program % COPIES * LOW_PARTS
    zeros_T = tl.zeros([TILE], tl.int32)
    for tile in range(program, tl.cdiv(n, TILE), tl.num_programs(0)):
        key_T, inside_T = _load_keys(w_ptr, tile, n, KEY_MASK, TILE)
        chosen_T = inside_T & (key_T >> 16 == chosen_bin)
        low_T = key_T & 0xFFFF
        zeros_T += (chosen_T & (low_T == 0)).to(tl.int32)
        some_T = chosen_T & (low_T != 0)
        tl.atomic_add(counts_ptr + copy + low_T, 1, mask=some_T, sem="relaxed")
    tl.atomic_add(counts_ptr + copy, tl.sum(zeros_T, 0), sem="relaxed")


@triton.jit(do_not_specialize=["key"])
def _count_equal_rows(
    w_ptr,
    equal_ptr,
    key,
    columns,
    row_stride,
    KEY_MASK: tl.constexpr,
    TILE: tl.constexpr,
):
    """How many keys of a row equal one; a program takes one row."""
    row = tl.program_id(0).to(tl.int64)
    lane_T = tl.arange(0, TILE)
    count_T = tl.zeros([TILE], tl.int32)
    for start in range(0, columns, TILE):
        inside_T = lane_T < columns - start
        pattern_T = tl.load(w_ptr + row * row_stride + start + lane_T, mask=inside_T, other=0)
        count_T += (inside_T & ((pattern_T & KEY_MASK).to(tl.int32) == key)).to(tl.int32)
    tl.store(equal_ptr + row, tl.sum(count_T, 0).to(tl.int64))


def count_keys(
    weights: torch.Tensor,
    number_format: NumberFormat,
    workspace: DeviceWorkspace,
    *,
    spread: Spread | None = None,
) -> torch.Tensor:
    """Count the keys of weights of 16 bits.

    Args:
        weights: int16, contiguous bit patterns on the workspace's device, fewer than 2**31.
        number_format: Their format.
        workspace: Active.
        spread: How; what suits the device if None.

    Returns:
        int64 [2**15], on the device.
    """
    return _count(weights, number_format, workspace, spread)[0]


def count_bins(
    weights: torch.Tensor,
    workspace: DeviceWorkspace,
    *,
    spread: Spread | None = None,
) -> torch.Tensor:
    """Count float32 weights by the upper 15 bits of their keys.

    Args:
        weights: int32, contiguous bit patterns on the workspace's device, fewer than 2**31.
        workspace: Active.
        spread: How; what suits the device if None.

    Returns:
        int64 [3, 2**15], on the device: counts, sums of the low 16 bits, sums of their squares.
    """
    return _count(weights, F32, workspace, spread)


def _count(
    weights: torch.Tensor,
    number_format: NumberFormat,
    workspace: DeviceWorkspace,
    spread: Spread | None,
) -> torch.Tensor:
    n = weights.numel()
    spread = spread or Spread.over(workspace.device, n, number_format)
    first, window = spread.window or (0, 1)
    low_bits = number_format.bits - 16
    copies = workspace.on_device("counts", 4 * spread.copies * BINS).view(torch.int32).zero_()
    sums_bytes = 8 * spread.copies * BINS if low_bits else 0
    sums = workspace.on_device("low sums", 2 * sums_bytes).view(torch.int64).zero_()
    sums = sums.view(2, -1)
    _count_bins[spread.programs,](
        weights,
        copies,
        sums[0],
        sums[1],
        n,
        KEY_MASK=number_format.key_mask,
        LOW_BITS=low_bits,
        BINS=BINS,
        COPIES=spread.copies,
        FIRST=first,
        WINDOW=window,
        TILE=spread.tile,
        num_warps=spread.warps,
        enable_fp_fusion=True,
    )
    counts = copies.view(spread.copies, BINS).sum(0, dtype=torch.int64)
    counts[0] = n - counts.sum()
    if not low_bits:
        return counts[None]
    return torch.cat([counts[None], sums.view(2, spread.copies, BINS).sum(1)])


def count_low_parts(
    weights: torch.Tensor,
    chosen_bin: int,
    workspace: DeviceWorkspace,
    *,
    spread: Spread | None = None,
) -> torch.Tensor:
    """Count the low parts of the float32 weights in one bin.

    Args:
        weights: int32, contiguous bit patterns on the workspace's device, fewer than 2**31.
        chosen_bin: The bin.
        workspace: Active.
        spread: How, with nothing in shared memory; what suits the device if None.

    Returns:
        int64 [2**16], on the device.
    """
    n = weights.numel()
    spread = spread or Spread.over(workspace.device, n, F32)
    nbytes = 4 * spread.copies * LOW_PARTS
    copies = workspace.on_device("counts", nbytes).view(torch.int32).zero_()
    _count_low_parts[spread.programs,](
        weights,
        copies,
        chosen_bin,
        n,
        KEY_MASK=F32.key_mask,
        LOW_PARTS=LOW_PARTS,
        COPIES=spread.copies,
        TILE=spread.tile,
        num_warps=spread.warps,
        enable_fp_fusion=True,
    )
    return copies.view(spread.copies, LOW_PARTS).sum(0, dtype=torch.int64)


def count_equal_rows(
    weights_RC: torch.Tensor,
    number_format: NumberFormat,
    key: int,
    workspace: DeviceWorkspace,
    *,
    tile: int | None = None,
) -> torch.Tensor:
    """How many weights of each row have a key.

    Args:
        weights_RC: int16 or int32 [R, C], bit patterns on the workspace's device, those of a row
            side by side and fewer than 2**31.
        number_format: Their format.
        key: The key.
        workspace: Active.
        tile: Weights that are looked at together, a power of two.

    Returns:
        int64 [R], on the device.
    """
    rows, columns = weights_RC.shape
    equal_R = workspace.on_device("equal weights", 8 * rows).view(torch.int64)
    if rows:
        _count_equal_rows[rows,](
            weights_RC,
            equal_R,
            key,
            columns,
            weights_RC.stride(0),
            KEY_MASK=number_format.key_mask,
            TILE=tile or tile_of(columns),
            num_warps=4,
            enable_fp_fusion=True,
        )
    return equal_R
