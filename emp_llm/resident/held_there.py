"""The same in a GPU's memory, for `held_planes`; it needs Triton, so it is imported when asked for.

But for `hold`, all here put kernels on the current stream and wait for nothing, so CUDA graphs can
capture them.
"""

from typing import TypeAlias

from emp_kernels.gpu_held import (
    DeviceHeldRows,
    gather_rows_there,
    hold_rows_there,
    multiply_rows_there,
    unpack_rows_there,
)
from emp_kernels.gpu_held_whole import (
    DeviceHeldWhole,
    gather_whole_there,
    hold_whole_there,
    multiply_whole_there,
    unpack_whole_there,
)
from emp_kernels.rows import Bytes
from torch import Tensor

from emp_llm.tensors.packed import PackedTensor
from emp_llm.tensors.whole import WholeTensor

__all__ = ["HeldThere", "gather", "hold", "multiply", "unpack"]

HeldThere: TypeAlias = DeviceHeldRows | DeviceHeldWhole
"""Rows of some planes in a GPU's memory, checked, ready to multiply."""


def hold(records: Tensor, packed: PackedTensor | WholeTensor, lines: Bytes) -> HeldThere:
    """Check records on the GPU where they are, and wait for it.

    Args:
        records: uint8 [bytes], the records and their padding.
        packed: What they are the records of.
        lines: The lines of its row table.

    Raises:
        DamagedRowError: If a record contradicts the row table or itself.
    """
    if isinstance(packed, PackedTensor):
        return hold_rows_there(records, packed.decode_table(lines), packed.layout)
    lengths, geometry = packed.decode_table(lines), packed.geometry
    return hold_whole_there(records, lengths, packed.layout, geometry.rows, geometry.columns)


def multiply(held: HeldThere, x: Tensor, out: Tensor, bias: Tensor | None) -> None:
    """See `emp_llm.resident.held_planes.multiply`."""
    if isinstance(held, DeviceHeldRows):
        multiply_rows_there(held, x, out, bias)
    else:
        multiply_whole_there(held, x, out, bias)


def unpack(held: HeldThere, first: int, stop: int, out: Tensor) -> None:
    """See `emp_llm.resident.held_planes.unpack`."""
    if isinstance(held, DeviceHeldRows):
        unpack_rows_there(held.part(first, stop), out)
    else:
        unpack_whole_there(held.part(first, stop), out)


def gather(held: HeldThere, rows: Tensor, out: Tensor) -> None:
    """See `emp_llm.resident.held_planes.gather`; all weights of a row that is not there are NaN."""
    if isinstance(held, DeviceHeldRows):
        gather_rows_there(held, rows, out)
    else:
        gather_whole_there(held, rows, out)
