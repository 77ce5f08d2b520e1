"""The planes of a packed tensor that is pruned; `FORMAT.md`, version 1, is the specification.

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
from emp_llm.tensors.packed_config import PRUNED_VERSION

__all__ = [
    "MAX_DIMENSIONS",
    "MAX_META_BYTES",
    "PLANE_ALIGN",
    "PackedTensor",
    "padding",
]


PLANE_ALIGN = 16
"""The length of each plane is a multiple of so many bytes; so its start is one as well."""

_META_FIELDS = 6
MAX_DIMENSIONS = 8
"""A packed tensor has so many dimensions at most."""

MAX_META_BYTES = 8 * (_META_FIELDS + MAX_DIMENSIONS)
"""Bytes of the longest NAME.emp_meta."""


@dataclass(frozen=True)
class PackedTensor:
    """What must be known of a packed tensor to read and write its planes.

    Attributes:
        geometry: The shape of the dense tensor, and how its rows run.
        layout: The layout of its records.
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
        """The bytes of NAME.emp_rows, padding included, for a row table, int64 [R, 3]."""
        data = table.astype(self._table_item).tobytes()
        return data + padding(len(data))

    @property
    def line_bytes(self) -> int:
        """Bytes of one line of the row table."""
        return 3 * self._table_item.itemsize

    def decode_table(self, data: Bytes) -> Table:
        """The lines, int64 [n, 3], in some bytes of a row table, uint8 [n · `line_bytes`]."""
        return data.view(self._table_item).astype(np.int64).reshape(-1, 3)

    def encode_meta(self) -> bytes:
        """The bytes of NAME.emp_meta, padding included."""
        layout, geometry = self.layout, self.geometry
        fields = [
            PRUNED_VERSION,
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

        Args:
            name: The tensor's name, for errors.
            data: The plane's bytes, which start with version 1.

        Raises:
            FormatError: If it describes no possible tensor.
        """
        fields = np.frombuffer(data, "<i8").tolist()
        try:
            packed = cls._of_fields(fields)
        except (ValueError, CheckpointError) as error:
            raise FormatError(
                f"{name!r}: its emp_meta {fields} is not that of a packed tensor: {error}; "
                "download or pack it again"
            ) from error
        # the encoding is unique, so whatever else the bytes hold shows as a difference
        if packed.encode_meta() != data:
            raise FormatError(
                f"{name!r}: its emp_meta has {len(fields)} fields, more than its shape needs; "
                "download or pack it again"
            )
        return packed

    @classmethod
    def _of_fields(cls, fields: list[int]) -> "PackedTensor":
        if len(fields) < _META_FIELDS:
            raise ValueError(f"it has fewer than {_META_FIELDS} fields")
        _, code, dropped_bits, radix, align, transposed, *shape = fields
        # zeros behind the shape are padding: the shape has none, for no empty tensor is packed
        while shape and shape[-1] == 0:
            shape.pop()
        if not 2 <= len(shape) <= MAX_DIMENSIONS or min(shape) <= 0:
            raise ValueError(f"its shape is {shape}")
        if transposed not in (0, 1):
            raise ValueError(f"transposed is {transposed}")
        number_formats = {number_format.code: number_format for number_format in FORMATS.values()}
        if code not in number_formats:
            raise ValueError(f"there is no number format {code}")
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
        return cls(geometry, layout)


def padding(used: int) -> bytes:
    """The zeros that bring a plane of so many bytes to a multiple of `PLANE_ALIGN`."""
    return bytes(-used % PLANE_ALIGN)
