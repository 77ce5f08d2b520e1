"""A tensor in memory packed and unpacked without loss, as `emp-llm pack` does it from files."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from emp_kernels.dispatch import pack_whole, unpack_whole
from emp_kernels.numbers import FORMATS, NumberFormat
from emp_kernels.rows import Bytes, Counts, Patterns, Workspace
from emp_kernels.whole_layout import WholeLayout

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.pruning.rest_job import rest_geometry
from emp_llm.tensors.code_choice import choose_code, read_sample
from emp_llm.tensors.geometry import RowBlock, WholeGeometry
from emp_llm.tensors.whole import WholeTensor

__all__ = ["Code", "choose", "number_format_of"]


@dataclass(frozen=True)
class Code:
    """How a tensor is packed.

    Attributes:
        rows: Its bit patterns, uint16 or uint32 [rows, columns].
        geometry: How they run.
        layout: The layout of its records.
    """

    rows: Patterns
    geometry: WholeGeometry
    layout: WholeLayout

    @property
    def blocks(self) -> list[RowBlock]:
        """The row blocks that are packed at a time."""
        return list(self.geometry.row_blocks())

    @property
    def extra_bytes(self) -> int:
        """Bytes of the table and the parameters."""
        whole = WholeTensor(self.geometry, self.layout)
        return whole.table_bytes + len(whole.encode_meta())

    def pack(self, block: RowBlock, workspace: Workspace) -> tuple[Bytes, Counts]:
        """The records of a row block and their lengths, in memory of their own."""
        rows = self.rows[block.start : block.stop]
        packed = pack_whole(rows, self.layout, workspace=workspace)
        return packed.payload.copy(), packed.lengths

    def unpack(self, rows: Patterns, packed: tuple[Bytes, Counts], workspace: Workspace) -> None:
        """Write the weights of a row block."""
        unpack_whole(*packed, self.layout, rows, workspace=workspace)

    def new_rows(self) -> Patterns:
        """Memory for the tensor's weights."""
        return np.empty_like(self.rows)

    def tensor(self, rows: Patterns) -> torch.Tensor:
        """A tensor that shares such memory."""
        number_format = self.geometry.number_format
        flat = torch.from_numpy(rows.reshape(-1).view(np.uint8))
        return flat.view(number_format.torch_dtype).reshape(self.geometry.shape)


def number_format_of(tensor: torch.Tensor) -> NumberFormat | None:
    """The format of a tensor's weights; None if it is not one that is packed."""
    return next((f for f in FORMATS.values() if f.torch_dtype == tensor.dtype), None)


def choose(name: str, tensor: torch.Tensor) -> Code | None:
    """Choose the code of a tensor; None if it stays plain."""
    number_format = number_format_of(tensor)
    if number_format is None:
        return None
    entry = TensorEntry(name, number_format.name, tuple(tensor.shape), 0, tensor.nbytes)
    geometry = rest_geometry(entry)
    if geometry is None:
        return None
    flat = tensor.reshape(-1).view(torch.uint8).numpy().view(number_format.storage)
    rows = flat.reshape(geometry.rows, geometry.columns)
    sample = read_sample(geometry, lambda block: rows[block.start : block.stop])
    layout = choose_code(sample, geometry)
    return None if layout is None else Code(rows, geometry, layout)
