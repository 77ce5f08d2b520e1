"""The planes of one packed tensor in memory, and the weights of its rows."""

from functools import cached_property
from typing import Final, cast

import numpy as np
import torch
from emp_kernels.dispatch import unpack_whole
from emp_kernels.errors import DamagedRowError
from emp_kernels.held import HeldRows
from emp_kernels.held_dispatch import hold_rows, unpack_held_rows
from emp_kernels.numbers import NumberFormat, patterns_of_tensor
from emp_kernels.rows import Bytes, Counts, Patterns

from emp_llm.tensors.geometry import Geometry, WholeGeometry
from emp_llm.tensors.packed import PackedTensor
from emp_llm.tensors.packed_config import WHOLE_VERSION
from emp_llm.tensors.planes import META_SUFFIX, ROWS_SUFFIX
from emp_llm.tensors.whole import WholeTensor

__all__ = ["HeldPlanes", "described"]

_NAME: Final = "a packed weight"


def described(meta: bytes) -> PackedTensor | WholeTensor:
    """What the parameters of a packed tensor, the bytes of its emp_meta, say of it.

    Raises:
        FormatError: If they describe no possible tensor.
    """
    if int.from_bytes(meta[:8], "little") == WHOLE_VERSION:
        return WholeTensor.decode_meta(_NAME, meta)
    return PackedTensor.decode_meta(_NAME, meta)


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
        return self if self.buffer.is_cpu else HeldPlanes(self.buffer.cpu(), self.meta)

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

    def check(self) -> None:
        """Check every record; for planes on the CPU.

        Raises:
            DamagedRowError: If one contradicts the row table or itself. Its row is the record.
        """
        geometry = self.geometry
        if not isinstance(geometry, WholeGeometry):
            self.held_rows  # noqa: B018 (made where it is first asked for, and checked)
            return
        for block in geometry.row_blocks():
            rows = np.empty((block.stop - block.start, geometry.columns), self._storage)
            try:
                self.unpack(block.start, block.stop, rows)
            except DamagedRowError as error:
                start = block.start // geometry.record_rows
                raise DamagedRowError(start + error.row, error.fault) from error

    @property
    def _storage(self) -> np.dtype[np.unsignedinteger]:
        return self.number_format.storage

    @cached_property
    def held_rows(self) -> HeldRows:
        """Its rows, ready to multiply; of a tensor that was pruned, with planes on the CPU.

        Raises:
            DamagedRowError: If a record contradicts the row table or itself.
            TypeError: If the tensor was not pruned.
        """
        packed = self.packed
        if not isinstance(packed, PackedTensor):
            raise TypeError("the records of a tensor that was not pruned are no rows")
        table = packed.decode_table(self._table_plane)
        end = packed.layout.sections(table[:, 0], table[:, 1]).sum()
        return hold_rows(self._bytes[:end], table, packed.layout)

    def unpack(self, first: int, stop: int, out: Patterns) -> None:
        """Decode some rows; for planes on the CPU.

        Args:
            first: The first row.
            stop: The row behind the last one.
            out: uint16 or uint32 [stop - first, columns], C-contiguous; written.
        """
        if isinstance(self.packed, PackedTensor):
            unpack_held_rows(self.held_rows, first, stop, out)
        else:
            self._unpack_whole(self.packed, self.packed.geometry, first, stop, out)

    def _unpack_whole(
        self,
        packed: WholeTensor,
        geometry: WholeGeometry,
        first: int,
        stop: int,
        out: Patterns,
    ) -> None:
        a_record = geometry.record_rows
        start, end = first // a_record, -(-stop // a_record)
        skipped = first - start * a_record
        rows = min(end * a_record, geometry.matrix_rows) - start * a_record
        fits = rows == len(out)
        whole = out if fits else np.empty((rows, geometry.columns), out.dtype)
        records = self._bytes[self._starts[start] : self._starts[end]]
        unpack_whole(records, self._lengths[start:end], packed.layout, whole)
        if not fits:
            out[:] = whole[skipped : skipped + len(out)]

    @cached_property
    def _bytes(self) -> Bytes:
        data: Bytes = self.buffer.numpy()
        return data

    @property
    def _table_plane(self) -> Bytes:
        packed, geometry = self.packed, self.packed.geometry
        lines = geometry.records if isinstance(geometry, WholeGeometry) else geometry.rows
        at = self.buffer.numel() - len(self.meta) - packed.table_bytes
        return self._bytes[at : at + lines * packed.line_bytes]

    @cached_property
    def _lengths(self) -> Counts:
        return cast(WholeTensor, self.packed).decode_table(self._table_plane)

    @cached_property
    def _starts(self) -> Counts:
        """Where each whole record starts, and the last one ends: int64 [records + 1]."""
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(self._lengths)])

    def weights(self) -> torch.Tensor:
        """All rows, dense, in the shape of the packed tensor; for planes on the CPU."""
        geometry = self.geometry
        rows = torch.empty(geometry.rows, geometry.columns, dtype=self.number_format.torch_dtype)
        self.unpack(0, geometry.rows, patterns_of_tensor(rows))
        if not geometry.transposed:
            return rows.view(geometry.shape)
        matrices = rows.view(*geometry.shape[:-2], geometry.matrix_rows, geometry.columns)
        return matrices.mT.contiguous()
