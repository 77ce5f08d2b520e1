"""The planes of one packed tensor in memory, and the weights of its rows."""

from functools import cached_property
from typing import TYPE_CHECKING, Final, TypeAlias
from weakref import WeakValueDictionary

import torch
from emp_kernels.held import HeldRows, HeldWhole
from emp_kernels.held_dispatch import (
    gather_rows,
    gather_whole,
    hold_rows,
    hold_whole,
    multiply_rows,
    multiply_whole,
    unpack_held_rows,
    unpack_held_whole,
)
from emp_kernels.numbers import NumberFormat
from emp_kernels.rows import Bytes, Patterns
from torch import Tensor

from emp_llm.tensors.geometry import Geometry, WholeGeometry
from emp_llm.tensors.packed import PackedTensor
from emp_llm.tensors.packed_config import WHOLE_VERSION
from emp_llm.tensors.planes import META_SUFFIX, ROWS_SUFFIX
from emp_llm.tensors.whole import WholeTensor

if TYPE_CHECKING:
    from emp_llm.resident.held_there import HeldThere

__all__ = ["Held", "HeldPlanes", "described", "gather", "is_there", "multiply", "unpack"]

Held: TypeAlias = "HeldRows | HeldWhole | HeldThere"
"""Rows of some planes, checked, ready to multiply on their device."""

_UNSIGNED: Final = {2: torch.uint16, 4: torch.uint32}

_NAME: Final = "a packed weight"


def described(meta: bytes) -> PackedTensor | WholeTensor:
    """What the parameters of a packed tensor, the bytes of its emp_meta, say of it.

    Raises:
        FormatError: If they describe no possible tensor.
    """
    if int.from_bytes(meta[:8], "little") == WHOLE_VERSION:
        return WholeTensor.decode_meta(_NAME, meta)
    return PackedTensor.decode_meta(_NAME, meta)


def is_there(tensor: Tensor) -> bool:
    """Whether a GPU's kernels do the work with a tensor, and not the CPU's."""
    return tensor.is_cuda


class HeldPlanes:
    """The planes of one packed tensor, which has been checked.

    Args:
        buffer: uint8 [bytes], the records, the row table and the parameters, one after the other,
            on any device. Its bytes are never changed.
        meta: The parameters.
    """

    def __init__(self, buffer: torch.Tensor, meta: bytes) -> None:
        self.buffer = buffer
        self.meta = meta
        self.packed = described(meta)
        self._elsewhere: WeakValueDictionary[torch.device, HeldPlanes] = WeakValueDictionary()

    @property
    def geometry(self) -> Geometry:
        """The shape of the packed tensor, and how its rows run."""
        return self.packed.geometry

    @property
    def number_format(self) -> NumberFormat:
        """The format of its weights."""
        return self.packed.layout.number_format

    @property
    def is_whole(self) -> bool:
        """Whether all weights were kept: its records are whole ones."""
        return isinstance(self.packed, WholeTensor)

    def on_cpu(self) -> "HeldPlanes":
        """The same on the CPU."""
        return self.moved(torch.device("cpu"))

    def moved(self, device: torch.device) -> "HeldPlanes":
        """The same on another device; weights that share planes share them there.

        On a GPU rows are checked now, so that no product waits for it, and graphs can capture all.
        """
        device = torch.empty(0, device=device).device  # which of them, if it is just any GPU
        if device == self.buffer.device:
            return self
        planes = self._elsewhere.get(device)
        if planes is None:
            planes = self._elsewhere[device] = HeldPlanes(self.buffer.to(device), self.meta)
            if is_there(planes.buffer):
                _ = planes.held
        return planes

    def planes(self, name: str) -> dict[str, torch.Tensor]:
        """The planes by name, views of the buffer: uint8 [bytes] and int64 [fields].

        transformers puts tensors that share memory into the same shard, where a reader looks for
        all planes of a tensor.
        """
        meta_at = self.buffer.numel() - len(self.meta)
        rows_at = meta_at - self.packed.table_bytes
        return {
            name: self.buffer[:rows_at],
            name + ROWS_SUFFIX: self.buffer[rows_at:meta_at],
            name + META_SUFFIX: self.buffer[meta_at:].view(torch.int64),
        }

    @cached_property
    def held(self) -> Held:
        """Its rows, ready to multiply where they are.

        Raises:
            DamagedRowError: If a record contradicts the row table or itself. Its row is the record.
        """
        packed = self.packed
        if is_there(self.buffer):
            from emp_llm.resident.held_there import hold

            records, *_ = self.planes("").values()
            return hold(records, packed, self._table)
        if isinstance(packed, PackedTensor):
            table = packed.decode_table(self._table)
            end = packed.layout.sections(table[:, 0], table[:, 1]).sum()
            return hold_rows(self._bytes[:end], table, packed.layout)
        lengths, geometry = packed.decode_table(self._table), packed.geometry
        here = self._bytes[: lengths.sum()]
        return hold_whole(here, lengths, packed.layout, geometry.rows, geometry.columns)

    @cached_property
    def _bytes(self) -> Bytes:
        data: Bytes = self.buffer.numpy()
        return data

    @property
    def _table(self) -> Bytes:
        """The lines of the row table."""
        packed, geometry = self.packed, self.packed.geometry
        lines = geometry.records if isinstance(geometry, WholeGeometry) else geometry.rows
        at = self.buffer.numel() - len(self.meta) - packed.table_bytes
        table: Bytes = self.buffer[at : at + lines * packed.line_bytes].cpu().numpy()
        return table

    def weights(self) -> torch.Tensor:
        """All rows, dense, in the shape of the packed tensor; for planes on the CPU."""
        geometry = self.geometry
        rows = torch.empty(geometry.rows, geometry.columns, dtype=self.number_format.torch_dtype)
        unpack(self.held, 0, geometry.rows, rows)
        if not geometry.transposed:
            return rows.view(geometry.shape)
        matrices = rows.view(*geometry.shape[:-2], geometry.matrix_rows, geometry.columns)
        return matrices.mT.contiguous()


def multiply(held: Held, x: Tensor, out: Tensor, bias: Tensor | None) -> None:
    """Multiply a few tokens by rows of any kind: out = x Wᵀ + bias.

    Args:
        held: The rows, W [R, C].
        x: [T, C], contiguous, of the weights' dtype.
        out: [T, R], contiguous; written.
        bias: [R], contiguous.
    """
    if isinstance(held, HeldRows):
        multiply_rows(held, _patterns(x), _patterns(out), _patterns_or_none(bias))
    elif isinstance(held, HeldWhole):
        multiply_whole(held, _patterns(x), _patterns(out), _patterns_or_none(bias))
    else:
        from emp_llm.resident.held_there import multiply as multiply_there

        multiply_there(held, x, out, bias)


def unpack(held: Held, first: int, stop: int, out: Tensor) -> None:
    """Decode rows of any kind.

    Args:
        held: The rows.
        first: The first row.
        stop: The row behind the last one.
        out: [stop - first, columns], contiguous; written.
    """
    if isinstance(held, HeldRows):
        unpack_held_rows(held, first, stop, _patterns(out))
    elif isinstance(held, HeldWhole):
        unpack_held_whole(held, first, stop, _patterns(out))
    else:
        from emp_llm.resident.held_there import unpack as unpack_there

        unpack_there(held, first, stop, out)


def gather(held: Held, rows: Tensor, out: Tensor) -> None:
    """Look up rows of any kind.

    Args:
        held: The rows.
        rows: int64 [n], contiguous, the numbers of rows.
        out: [n, columns], contiguous; written.
    """
    if isinstance(held, HeldRows):
        gather_rows(held, rows.numpy(), _patterns(out))
    elif isinstance(held, HeldWhole):
        gather_whole(held, rows.numpy(), _patterns(out))
    else:
        from emp_llm.resident.held_there import gather as gather_there

        gather_there(held, rows, out)


def _patterns(tensor: Tensor) -> Patterns:
    """As `emp_kernels.numbers.patterns_of_tensor`, in fewer steps: it is called for each token."""
    patterns: Patterns = tensor.detach().view(_UNSIGNED[tensor.itemsize]).numpy()
    return patterns


def _patterns_or_none(tensor: Tensor | None) -> Patterns | None:
    return None if tensor is None else _patterns(tensor)
