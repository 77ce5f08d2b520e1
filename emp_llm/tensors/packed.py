"""A packed tensor as plain tensors of a safetensors file; `FORMAT.md` is the specification.

NAME            uint8 [bytes]       the rows' records, one after the other
NAME.emp_rows   uint8 [bytes]       per row: weights kept, escapes, base of the window
NAME.emp_meta   int64 [6 + dims]    version, number format, layout, shape
"""

from dataclasses import dataclass

import numpy as np
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import FORMATS
from emp_kernels.rows import Bytes, Table

from emp_llm.errors import CheckpointError, FormatError
from emp_llm.tensors.geometry import Geometry
from emp_llm.tensors.packed_config import FORMAT_VERSION

__all__ = [
    "MAX_META_BYTES",
    "PLANE_ALIGN",
    "PackedTensor",
    "padding",
]


PLANE_ALIGN = 16
"""Every plane's length is a multiple of this many bytes, so that each starts at one too."""

_META_FIELDS = 6
_MAX_DIMENSIONS = 8

MAX_META_BYTES = 8 * (_META_FIELDS + _MAX_DIMENSIONS)
"""Bytes of the longest NAME.emp_meta."""


@dataclass(frozen=True)
class PackedTensor:
    """What a packed tensor's planes have in common.

    Attributes:
        geometry: The tensor that is packed.
        layout: How its rows are.
    """

    geometry: Geometry
    layout: RowLayout

    @property
    def _table_item(self) -> np.dtype[np.unsignedinteger]:
        wide = self.geometry.columns > 0xFFFF or self.geometry.number_format.bits > 16
        return np.dtype("<u4" if wide else "<u2")

    @property
    def table_bytes(self) -> int:
        """Bytes of the row table, padding included."""
        used = self.geometry.rows * self.line_bytes
        return used + len(padding(used))

    def encode_table(self, table: Table) -> bytes:
        """The row table of int64 [R, 3] as the bytes of NAME.emp_rows."""
        data = table.astype(self._table_item).tobytes()
        return data + padding(len(data))

    @property
    def line_bytes(self) -> int:
        """Bytes of a row's line of the table."""
        return 3 * self._table_item.itemsize

    def decode_table(self, data: Bytes) -> Table:
        """Lines of the row table, uint8 [R · `line_bytes`], as int64 [R, 3]."""
        return data.view(self._table_item).astype(np.int64).reshape(-1, 3)

    def encode_meta(self) -> bytes:
        """The bytes of NAME.emp_meta; zeros after the shape make it an even number of int64."""
        layout, geometry = self.layout, self.geometry
        fields = [
            FORMAT_VERSION,
            geometry.number_format.code,
            layout.dropped_bits,
            layout.radix,
            layout.align,
            int(geometry.transposed),
            *geometry.shape,
        ]
        data = np.array(fields, "<i8").tobytes()
        return data + padding(len(data))

    @classmethod
    def decode_meta(cls, name: str, data: bytes) -> "PackedTensor":
        """Read NAME.emp_meta.

        Raises:
            FormatError: If it is of another version, or describes nothing that can be.
        """
        fields = np.frombuffer(data, "<i8").tolist()
        version = fields[0] if fields else 0
        if version != FORMAT_VERSION:
            raise FormatError(
                f"{name!r} is packed in version {version} of the format; this emp-llm reads "
                f"version {FORMAT_VERSION}: install a release that knows it"
            )
        number_formats = {number_format.code: number_format for number_format in FORMATS.values()}
        _, code, dropped_bits, radix, align, transposed, *shape = [*fields, *[0] * _META_FIELDS][
            : max(len(fields), _META_FIELDS)
        ]
        # padding: the shape has no zeros of its own, for an empty tensor is not packed
        while shape and shape[-1] == 0:
            shape.pop()
        sizes_fit = 2 <= len(shape) <= _MAX_DIMENSIONS and all(size > 0 for size in shape)
        if code not in number_formats or transposed not in (0, 1) or not sizes_fit:
            raise FormatError(f"{name!r}: its emp_meta {fields} describes no packed tensor")
        try:
            geometry = Geometry(
                number_format=number_formats[code], shape=tuple(shape), transposed=bool(transposed)
            )
            layout = RowLayout(
                number_format=geometry.number_format,
                columns=geometry.columns,
                dropped_bits=dropped_bits,
                radix=radix,
                align=align,
            )
        except (ValueError, CheckpointError) as error:
            raise FormatError(f"{name!r}: its emp_meta is impossible: {error}") from error
        packed = cls(geometry, layout)
        if packed.encode_meta() != data:
            raise FormatError(f"{name!r}: its emp_meta has {len(fields)} fields, too many")
        return packed


def padding(used: int) -> bytes:
    """The zeros that fill a plane of so many bytes to a multiple of PLANE_ALIGN."""
    return bytes(-used % PLANE_ALIGN)
