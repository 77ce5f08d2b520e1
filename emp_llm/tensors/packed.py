"""A packed tensor as plain tensors of a safetensors file; `FORMAT.md` is the specification.

NAME            uint8 [bytes]       the rows' records, one after the other
NAME.emp_rows   uint8 [bytes]       per row: weights kept, escapes, base of the window
NAME.emp_meta   int64 [6 + dims]    version, number format, layout, shape
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import FORMATS
from emp_kernels.rows import Bytes, Table

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.errors import CheckpointError, FormatError
from emp_llm.tensors.geometry import Geometry

__all__ = [
    "FORMAT_VERSION",
    "MAX_META_BYTES",
    "META_SUFFIX",
    "PLANE_ALIGN",
    "QUANT_METHOD",
    "ROWS_SUFFIX",
    "PackedTensor",
    "Planes",
    "check_names",
    "find_packed",
    "is_packed",
    "padding",
    "quantization_config",
]


FORMAT_VERSION = 1
QUANT_METHOD = "emp"
ROWS_SUFFIX = ".emp_rows"
META_SUFFIX = ".emp_meta"

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


@dataclass(frozen=True)
class Planes:
    """Where the planes of one packed tensor lie in a shard."""

    records: TensorEntry
    rows: TensorEntry
    meta: TensorEntry

    @property
    def nbytes(self) -> int:
        """Bytes of the three together."""
        return self.records.nbytes + self.rows.nbytes + self.meta.nbytes


def quantization_config(rule: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.json` says of a packed checkpoint that was pruned by this rule."""
    return {"quant_method": QUANT_METHOD, "format_version": FORMAT_VERSION, **rule}


def padding(used: int) -> bytes:
    """The zeros that fill a plane of so many bytes to a multiple of PLANE_ALIGN."""
    return bytes(-used % PLANE_ALIGN)


def check_names(names: Iterable[str]) -> None:
    """Check that no tensor of a source bears the name of a plane.

    Raises:
        CheckpointError: If one does.
    """
    for name in names:
        if name.endswith((ROWS_SUFFIX, META_SUFFIX)):
            raise CheckpointError(
                f"{name!r} is the name of a packed tensor's plane: the checkpoint is packed; run "
                "'emp-llm unpack' on it or prune its dense source"
            )


def find_packed(
    where: str, tensors: Iterable[TensorEntry]
) -> tuple[dict[str, Planes], list[TensorEntry]]:
    """Tell the packed tensors of a shard from the plain ones.

    Args:
        where: The shard's file name, for errors.
        tensors: All of its tensors.

    Returns:
        Planes of each packed tensor by its name, and the plain tensors, both in data order.

    Raises:
        FormatError: If a plane is missing, left over or of a kind that no plane is.
    """
    entries = {entry.name: entry for entry in tensors}
    packed = {
        name.removesuffix(META_SUFFIX): _planes(where, name.removesuffix(META_SUFFIX), entries)
        for name in entries
        if name.endswith(META_SUFFIX)
    }
    taken = Counter(entry.name for planes in packed.values() for entry in _each(planes))
    for name, count in taken.items():
        if count > 1:
            raise FormatError(
                f"{where}: {name!r} would be a plane of two packed tensors: pack the checkpoint "
                "again"
            )
    plain = [entry for name, entry in entries.items() if name not in taken]
    for entry in plain:
        if entry.name.endswith(ROWS_SUFFIX):
            raise FormatError(
                f"{where}: {entry.name!r} is there without its other planes: the shard was taken "
                "apart; pack or download it again"
            )
    return packed, plain


def _each(planes: Planes) -> tuple[TensorEntry, TensorEntry, TensorEntry]:
    return planes.records, planes.rows, planes.meta


def _planes(where: str, name: str, entries: Mapping[str, TensorEntry]) -> Planes:
    found = []
    for suffix, dtype in (("", "U8"), (ROWS_SUFFIX, "U8"), (META_SUFFIX, "I64")):
        entry = entries.get(name + suffix)
        if entry is None:
            raise FormatError(
                f"{where}: packed tensor {name!r} lacks its plane {name + suffix!r}: the shard was "
                "taken apart; pack or download it again"
            )
        if entry.dtype != dtype or len(entry.shape) != 1:
            raise FormatError(
                f"{where}: plane {entry.name!r} is {entry.dtype} {list(entry.shape)}; it must be "
                f"{dtype} of one dimension"
            )
        found.append(entry)
    return Planes(*found)


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a packed checkpoint."""
    method = config.get("quantization_config")
    return isinstance(method, dict) and method.get("quant_method") == QUANT_METHOD
