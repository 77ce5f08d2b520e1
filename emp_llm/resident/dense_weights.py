"""A dense tensor on the CPU, seen as rows of bit patterns."""

import torch
from emp_kernels.dispatch import turn
from emp_kernels.numbers import FORMATS, NumberFormat, patterns_of_tensor
from emp_kernels.rows import Patterns, Workspace

from emp_llm.tensors.geometry import Geometry, RowBlock
from emp_llm.tensors.row_reader import block_memory

__all__ = ["NUMBER_FORMATS", "DenseWeights"]

NUMBER_FORMATS: dict[torch.dtype, NumberFormat] = {
    number_format.torch_dtype: number_format for number_format in FORMATS.values()
}
"""The number formats that are pruned and packed, by their dtypes in torch."""


class DenseWeights:
    """A dense tensor on the CPU, seen as rows.

    Args:
        tensor: Contiguous, of a dtype in NUMBER_FORMATS.
        geometry: How its rows run.
    """

    def __init__(self, tensor: torch.Tensor, geometry: Geometry) -> None:
        self.tensor = tensor
        self.geometry = geometry
        shape = geometry.matrices, -1, geometry.shape[-1]
        self._matrices: Patterns = patterns_of_tensor(tensor).reshape(shape)

    @classmethod
    def empty(cls, geometry: Geometry) -> "DenseWeights":
        """A tensor with arbitrary values, to be filled."""
        tensor = torch.empty(geometry.shape, dtype=geometry.number_format.torch_dtype)
        return cls(tensor, geometry)

    def in_place(self, block: RowBlock) -> Patterns | None:
        """A view of a row block, [rows, columns]; None if rows are not contiguous in memory."""
        if self.geometry.transposed:
            return None
        rows: Patterns = self._matrices[block.matrix, block.start : block.stop]
        return rows

    def rows(self, block: RowBlock, workspace: Workspace) -> Patterns:
        """A row block, [rows, columns], C-contiguous; copied to the workspace if transposed."""
        rows = self.in_place(block)
        if rows is None:
            rows = block_memory(self.geometry, block, workspace)
            turn(self._matrices[block.matrix, :, block.start : block.stop], rows)
        return rows

    def place(self, block: RowBlock, rows: Patterns) -> None:
        """Write a row block, [rows, columns], of a transposed tensor."""
        turn(rows, self._matrices[block.matrix, :, block.start : block.stop])
