"""Count bit patterns on a device, for `emp_kernels.histogram`.

Results lie in buffers of the workspace, until the next call of the same function with it.
"""

import torch
import triton
import triton.language as tl

from emp_kernels.device_workspace import DeviceWorkspace
from emp_kernels.gpu.common import tile_of
from emp_kernels.numbers import NumberFormat

__all__ = ["count_equal_rows"]


@triton.jit(do_not_specialize=["key"])
def _count_equal_rows(w_ptr, equal_ptr, key, columns, KEY_MASK: tl.constexpr, TILE: tl.constexpr):
    """How many keys of a row equal one, a program a row."""
    row = tl.program_id(0).to(tl.int64)
    lane_T = tl.arange(0, TILE)
    count_T = tl.zeros([TILE], tl.int32)
    for start in range(0, columns, TILE):
        inside_T = lane_T < columns - start
        pattern_T = tl.load(w_ptr + row * columns + start + lane_T, mask=inside_T, other=0)
        count_T += (inside_T & ((pattern_T & KEY_MASK).to(tl.int32) == key)).to(tl.int32)
    tl.store(equal_ptr + row, tl.sum(count_T, 0).to(tl.int64))


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
        weights_RC: int16 or int32 [R, C], contiguous bit patterns on the workspace's device, fewer
            than 2**31 in a row.
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
            KEY_MASK=number_format.key_mask,
            TILE=tile or tile_of(columns),
            num_warps=4,
        )
    return equal_R
