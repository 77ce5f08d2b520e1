"""The planes of a packed tensor that is not pruned; `FORMAT.md`, version 2, is the specification.

NAME            uint8 [bytes]        the records, one after the other
NAME.emp_rows   uint8 [bytes]        the length of each record
NAME.emp_meta   int64 [37 + dims]    version, number format, code, shape
"""

from dataclasses import dataclass

import numpy as np
from emp_kernels.numbers import FORMATS
from emp_kernels.rows import Bytes, Counts
from emp_kernels.whole_layout import MAX_LISTS, WholeLayout, context_bits

from emp_llm.errors import CheckpointError, FormatError
from emp_llm.tensors.geometry import WholeGeometry
from emp_llm.tensors.packed import MAX_DIMENSIONS, padding
from emp_llm.tensors.packed_config import WHOLE_VERSION

__all__ = ["MAX_WHOLE_META_BYTES", "WholeTensor"]

_LIST_BYTES = 64  # a byte an exponent; no code has more than 56
_META_FIELDS = 5 + MAX_LISTS * _LIST_BYTES // 8

MAX_WHOLE_META_BYTES = 8 * (_META_FIELDS + MAX_DIMENSIONS + 1)
"""Bytes of the longest NAME.emp_meta of such a tensor."""

_LENGTH = np.dtype("<u4")
_MOST_RECORD_WEIGHTS = 1 << 22  # as of the columns of a row: a record is decoded in memory


@dataclass(frozen=True)
class WholeTensor:
    """What must be known of a packed tensor that is not pruned to read and write its planes.

    Attributes:
        geometry: The shape of the dense tensor, and how many of its rows a record holds.
        layout: The layout of its records.
    """

    geometry: WholeGeometry
    layout: WholeLayout

    @property
    def table_bytes(self) -> int:
        """Bytes of the plane of lengths, padding included."""
        used = self.geometry.records * _LENGTH.itemsize
        return used + len(padding(used))

    @property
    def line_bytes(self) -> int:
        """Bytes of a line of the plane of lengths: one length."""
        return _LENGTH.itemsize

    def encode_table(self, lengths: Counts) -> bytes:
        """The bytes of NAME.emp_rows, padding included, for the lengths, int64 [records]."""
        data = lengths.astype(_LENGTH).tobytes()
        return data + padding(len(data))

    def decode_table(self, data: Bytes) -> Counts:
        """The lengths, int64 [n], in some bytes of NAME.emp_rows, uint8 [n · `line_bytes`]."""
        return data.view(_LENGTH).astype(np.int64)

    def encode_meta(self) -> bytes:
        """The bytes of NAME.emp_meta, padding included."""
        layout = self.layout
        lists = np.zeros((MAX_LISTS, _LIST_BYTES), np.uint8)
        lists[: len(layout.exponents), : layout.symbols] = layout.exponents
        fields = [
            WHOLE_VERSION,
            layout.number_format.code,
            layout.dropped_bits,
            layout.weights,
            sum(width << 4 * tier for tier, width in enumerate(layout.widths)),
            *lists.reshape(-1).view("<i8").tolist(),
            *self.geometry.shape,
        ]
        data = np.array(fields, "<i8").tobytes()
        return data + padding(len(data))

    @classmethod
    def decode_meta(cls, name: str, data: bytes) -> "WholeTensor":
        """Read NAME.emp_meta.

        Args:
            name: The tensor's name, for errors.
            data: The plane's bytes, which start with version 2.

        Raises:
            FormatError: If it describes no possible tensor.
        """
        fields = np.frombuffer(data, "<i8").tolist()
        try:
            whole = cls._of_fields(fields)
        except (ValueError, CheckpointError) as error:
            raise FormatError(
                f"{name!r}: its emp_meta {fields} is not that of a packed tensor: {error}; "
                "download or pack it again"
            ) from error
        # the encoding is unique, so whatever else the bytes hold shows as a difference
        if whole.encode_meta() != data:
            raise FormatError(
                f"{name!r}: its emp_meta has bytes set, or fields, that its code and its shape do "
                "not need; download or pack it again"
            )
        return whole

    @classmethod
    def _of_fields(cls, fields: list[int]) -> "WholeTensor":
        if len(fields) < _META_FIELDS:
            raise ValueError(f"it has fewer than {_META_FIELDS} fields")
        _, code, dropped_bits, weights, widths = fields[:5]
        shape = fields[_META_FIELDS:]
        while shape and shape[-1] == 0:  # zeros behind the shape are padding
            shape.pop()
        if not 2 <= len(shape) <= MAX_DIMENSIONS or min(shape) <= 0:
            raise ValueError(f"its shape is {shape}")
        number_formats = {number_format.code: number_format for number_format in FORMATS.values()}
        if code not in number_formats:
            raise ValueError(f"there is no number format {code}")
        if not 0 < weights <= _MOST_RECORD_WEIGHTS or weights % shape[-1]:
            raise ValueError(f"its records have {weights} weights, its rows {shape[-1]}")
        number_format, tiers = number_formats[code], _nibbles(widths)
        symbols = sum((1 << width) - 1 for width in tiers)
        lists = np.array(fields[5:_META_FIELDS], "<i8").view(np.uint8).reshape(MAX_LISTS, -1)
        contexts = 1 << context_bits(number_format.mantissa_bits - dropped_bits)
        layout = WholeLayout(
            number_format=number_format,
            weights=weights,
            widths=tiers,
            exponents=tuple(tuple(one) for one in lists[:contexts, :symbols].tolist()),
            dropped_bits=dropped_bits,
        )
        geometry = WholeGeometry(
            number_format=layout.number_format,
            shape=tuple(shape),
            record_rows=weights // shape[-1],
        )
        return cls(geometry, layout)


def _nibbles(field: int) -> tuple[int, ...]:
    """The widths of the tiers: four bits each, the first tier lowest."""
    if not 0 < field < 1 << 32:
        raise ValueError(f"its tiers are {field}")
    return tuple(field >> at & 15 for at in range(0, 32, 4) if field >> at)
