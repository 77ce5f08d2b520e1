"""Masks of zeros, one bit a weight, made and used on the weights' device.

Names of arrays carry their shape: R rows and C columns of a matrix, B bytes of a row's bits.
"""

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Mask"]

_CPU_WEIGHTS = 1 << 20
_DEVICE_WEIGHTS = 1 << 24
"""Weights per row block: few enough for a CPU's caches, enough to keep a GPU busy."""

_GATHER = 0x0102040810204080
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Mask:
    """Where a tensor is zero, one bit a weight.

    Args:
        tensor: A tensor of a floating-point dtype with at least one dimension; read once.

    Attributes:
        zeros: How many zeros the tensor has, of either sign.
    """

    def __init__(self, tensor: Tensor) -> None:
        columns = tensor.shape[-1]
        rows = tensor.numel() // columns if columns else 0
        self.zeros = 0
        self._bits_RB = torch.empty(rows, -(-columns // 8), dtype=torch.uint8, device=tensor.device)
        for start, block_RC in _row_blocks(tensor.detach()):
            keep_RC = block_RC != 0
            self.zeros += keep_RC.numel() - int(keep_RC.sum())
            self._bits_RB[start : start + len(block_RC)] = _pack(keep_RC)

    def clear(self, tensor: Tensor) -> None:
        """Set the zeros to +0.0 again, whatever is there, NaN too.

        Args:
            tensor: A tensor of the shape that the mask was made from, on any device.
        """
        # As integers, because 0 times any bits, those of NaN too, are the bits of +0.0.
        # masked_fill_ takes ten times as long on a CPU.
        integers = _INTEGERS[tensor.element_size()]
        for block_RC, keep_RC in self._with_row_blocks(tensor.detach().view(integers)):
            block_RC.mul_(keep_RC)

    def lost(self, tensor: Tensor) -> int:
        """Count the zeros of the mask that are not zero in a tensor of the same shape."""
        return sum(
            int(((block_RC != 0) & ~keep_RC).sum())
            for block_RC, keep_RC in self._with_row_blocks(tensor.detach())
        )

    def _with_row_blocks(self, tensor: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        self._bits_RB = self._bits_RB.to(tensor.device)  # once, where the tensor has moved
        for start, block_RC in _row_blocks(tensor):
            rows, columns = block_RC.shape
            yield block_RC, _unpack(self._bits_RB[start : start + rows], columns)


def _row_blocks(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The number of its first row and the rows of each row block, [R, C].

    The row blocks are views, whatever the tensor's strides.
    """
    if not tensor.numel():
        return
    matrices = _matrices(tensor if tensor.ndim > 1 else tensor[None])
    weights = _CPU_WEIGHTS if tensor.device.type == "cpu" else _DEVICE_WEIGHTS
    height = max(1, weights // tensor.shape[-1])
    start = 0
    for matrix in matrices:
        for block_RC in torch.split(matrix, height):
            yield start, block_RC
            start += len(block_RC)


def _matrices(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.ndim == 2:
        yield tensor
        return
    for part in tensor.unbind():
        yield from _matrices(part)


def _pack(keep_RC: Tensor) -> Tensor:
    """Bits of bools, [R, B]: the i-th of each eight in the bit of value 2ⁱ."""
    eights_RB = F.pad(keep_RC, (0, -keep_RC.shape[1] % 8)).view(torch.int64)
    # Eight bytes of 0 or 1 in an integer: multiplying puts each at its bit of the highest byte.
    return (eights_RB * _GATHER >> 56).to(torch.uint8)


def _unpack(bits_RB: Tensor, columns: int) -> Tensor:
    """Bools of bits, [R, C]."""
    eights = _spread(bits_RB.device).index_select(0, bits_RB.reshape(-1).int())
    return eights.view(bits_RB.shape).view(torch.bool)[:, :columns]


@cache
def _spread(device: torch.device) -> Tensor:
    """For each byte, its bits as eight bools in one integer: int64 [256]."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return bits.to(torch.uint8).view(torch.int64).squeeze(1).to(device)
