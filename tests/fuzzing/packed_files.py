"""Packed tensors whose planes are damaged or contradict each other.

What our reader makes of them, on every backend, is what the reader that was written from the
specification alone makes of them, or a refusal. Buffers end where no memory is.
"""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from emp_kernels.dispatch import pack_rows, resolve, unpack_rows, unpack_whole
from emp_kernels.layout import DIGITS, RowLayout
from emp_kernels.numbers import BF16, F16, F32
from emp_kernels.rows import PerRow
from fuzzing.choices import Choices, damaged
from fuzzing.headers import check_message
from support import format_reader
from support.packing import rows_of, tensor_of
from support.rows import KINDS, GuardedWorkspace, guarded, make_rows

from emp_llm.checkpoint.safetensors_header import encode_header, read_header_by
from emp_llm.checkpoint.shard import Shard
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.errors import EmpError
from emp_llm.tensors.geometry import Geometry, RowBlock
from emp_llm.tensors.packed import PackedTensor, padding
from emp_llm.tensors.packed_reader import PackedReader, open_shard
from emp_llm.tensors.planes import META_SUFFIX, ROWS_SUFFIX
from emp_llm.tensors.whole_reader import WholeReader

SLOW = 20_000
"""Weights from which on the specification's reader takes too long."""

KINDS_OF_PLANES = {"x": "U8", "x" + ROWS_SUFFIX: "U8", "x" + META_SUFFIX: "I64"}

Planes = dict[str, tuple[str, tuple[int, ...], bytes]]


def compile_kernels() -> None:
    """Have numba compile, or load, all that is called here; this takes up to a minute."""
    for number_format in (BF16, F32):
        layout = RowLayout(number_format=number_format, columns=70)
        weights = make_rows("gaussian", number_format, (1, 70))
        rows = pack_rows(weights, layout, PerRow(1.0), impl="simd")
        for impl in ("scalar", "simd"):
            unpack_rows(rows.payload, rows.table, layout, impl=impl)


def make_packed(choices: Choices) -> bytes:
    """A file with a packed tensor and a plain one, or nearly."""
    tensor, table, records = _packed(choices)
    how = choices.number(0, 9)
    if how <= 2:
        records = damaged(choices, records, [b"\0", b"\xff", b"\x7f\x80"])
    if how in (2, 3, 4):
        table = _spoiled_table(choices, table, tensor)
    if how == 4:
        records = _fitting(choices, tensor, table, records)
    meta = tensor.encode_meta()
    if how in (5, 6):
        meta = spoiled_meta(choices, meta)
    if how == 6:
        tensor, records, table = _as_told(choices, meta, tensor, records, table)
    rows = tensor.encode_table(table)
    if how == 7:
        rows = damaged(choices, rows, [bytes(16), b"\xff\xff", b"\1\0"])
    planes = {"x": padded(choices, records), "x" + ROWS_SUFFIX: rows, "x" + META_SUFFIX: meta}
    return file_of(choices, planes, odd=how == 8)


def _packed(choices: Choices) -> tuple[PackedTensor, np.ndarray, bytes]:
    number_format = choices.pick([BF16, BF16, F16, F32])
    columns = choices.pick([1, 7, 8, 9, 31, 32, 33, 63, 64, 65, choices.number(1, 200)])
    matrix_rows, transposed = choices.number(1, 4), choices.once_in(4)
    stack = choices.some(0, 2, lambda: choices.number(1, 2)) if choices.once_in(3) else []
    shape = (*stack, *((columns, matrix_rows) if transposed else (matrix_rows, columns)))
    geometry = Geometry(number_format=number_format, shape=shape, transposed=transposed)
    layout = RowLayout(
        number_format=number_format,
        columns=columns,
        dropped_bits=choices.pick([0, 0, 0, 1, 3, number_format.mantissa_bits]),
        radix=choices.pick(sorted(DIGITS)),
        align=choices.pick([1, 1, 1, 2, 16, 64]),
    )
    weights = make_rows(
        choices.pick(KINDS), number_format, (geometry.rows, columns), seed=choices.number(0, 999)
    )
    rows = pack_rows(weights, layout, PerRow(choices.pick([0.3, 1.0, 1.4, 1e9])), impl="simd")
    return PackedTensor(geometry, layout), rows.table, rows.payload.tobytes()


def _spoiled_table(choices: Choices, table: np.ndarray, tensor: PackedTensor) -> np.ndarray:
    table = table.copy()
    item = 65536 if tensor.line_bytes == 6 else 1 << 32
    row, field = choices.place(len(table)), choices.number(0, 2)
    columns, kept = tensor.geometry.columns, int(table[row, 0])
    near = [0, 1, kept, kept - 1, kept + 1, columns, columns + 1, int(table[row, field]) ^ 1]
    top = tensor.layout.number_format.key_mask >> tensor.layout.dropped_bits
    far = [item - 1, top, top + 1, max(top - tensor.layout.limit, 0), choices.number(0, item - 1)]
    table[row, field] = choices.pick([*near, *far]) % item
    return table


def _fitting(choices: Choices, tensor: PackedTensor, table: np.ndarray, records: bytes) -> bytes:
    """As many bytes of records as a table tells of."""
    if (table[:, 0] > tensor.geometry.columns).any() or (table[:, 1] > table[:, 0]).any():
        return records
    size = int(tensor.layout.offsets(table[:, 0], table[:, 1])[-1])
    return (records + choices.data(max(size - len(records), 0)))[:size]


def spoiled_meta(choices: Choices, meta: bytes) -> bytes:
    """Parameters of which one is changed, and maybe more of them."""
    fields = np.frombuffer(meta, "<i8").copy()
    at = choices.place(fields.size)
    small = choices.number(0, 8)
    value = choices.pick([small, small, choices.edge(), int(fields[at]) + 1, int(fields[at]) * 2])
    fields[at] = (value + (1 << 63)) % (1 << 64) - (1 << 63)
    data = fields.tobytes()
    return data + bytes(8 * choices.number(1, 9)) if choices.once_in(8) else data


def _as_told(
    choices: Choices, meta: bytes, tensor: PackedTensor, records: bytes, table: np.ndarray
) -> tuple[PackedTensor, bytes, np.ndarray]:
    """Records and table of the lengths that changed parameters ask for, if they are possible."""
    try:
        told = PackedTensor.decode_meta("x", meta)
    except EmpError:
        return tensor, records, table
    if told.geometry.rows > 1000:
        return tensor, records, table
    table = np.resize(table, (told.geometry.rows, 3))
    top = told.layout.number_format.key_mask >> told.layout.dropped_bits
    table = np.minimum(table, [told.geometry.columns, told.geometry.columns, top])
    return told, _fitting(choices, told, table, records), table


def padded(choices: Choices, data: bytes) -> bytes:
    """The plane of some records, padded, mostly as it should be."""
    if choices.once_in(20):
        return data + choices.data(-len(data) % 16)
    if choices.once_in(20):
        return data + bytes(choices.pick([0, 1, 16, 32]))
    return data + padding(len(data))


def file_of(choices: Choices, planes: Mapping[str, bytes], *, odd: bool) -> bytes:
    """A file of a tensor's planes and a plain tensor; if it is odd, one of them is another."""
    entries: Planes = {
        name: ("I64", (len(data) // 8,), data)
        if name.endswith(META_SUFFIX)
        else ("U8", (len(data),), data)
        for name, data in planes.items()
    }
    entries["plain"] = ("F32", (2,), bytes(8))
    if odd:
        name = choices.pick(sorted(entries))
        dtype, shape, data = entries.pop(name)
        if choices.once_in(2):
            other = choices.pick([*planes, "y", *(p + ROWS_SUFFIX for p in planes), "y.emp_meta"])
            entries[other] = dtype, shape, data
        elif choices.once_in(2):
            entries[name] = choices.pick(["I8", "BOOL", "F8_E4M3"]), (len(data),), data
        else:
            entries[name] = "U8", (1, len(data)), data
    names = sorted(entries, key=lambda _: choices.number(0, 99)) if choices.once_in(4) else entries
    described = [(name, *entries[name][:2], len(entries[name][2])) for name in names]
    return encode_header(described) + b"".join(entries[name][2] for name in names)


class _Memory(SourceFile):
    """A file that lies in memory."""

    name = "x.st"

    def __init__(self, content: bytes) -> None:
        self.content = content

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """As a file's."""
        file = io.BytesIO(self.content)
        file.seek(offset)
        assert file.readinto(buffer) == len(buffer), "reads past the end"

    def close(self) -> None:
        """Nothing is open."""


def check_packed(content: bytes) -> bool:
    """Decode the packed tensors of a file; returns whether all were taken.

    Raises:
        AssertionError: If a tensor is taken that is not what the specification's reader finds, or
            refused though that reader takes it.
    """
    header = read_header_by(lambda start, stop: content[start:stop], "x.st", len(content))
    shard = Shard("x.st", Path("x.st"), header)
    planes = {
        entry.name: content[entry.start : entry.end]
        for entry in header.tensors
        if len(entry.shape) == 1 and entry.dtype == KINDS_OF_PLANES.get(entry.name)
    }
    try:
        readers, _ = open_shard(shard, _Memory(content))
        decoded = {name: _decoded(reader) for name, reader in readers.items()}
    except EmpError as refusal:
        why = check_message(refusal, "x.st")
        if any(entry.name not in (*KINDS_OF_PLANES, "plain") for entry in header.tensors):
            return False  # of its other planes the specification's reader knows nothing
        if _taken_by_specification(planes):
            raise AssertionError(f"the specification takes it: {why}") from refusal
        return False
    for name, (reader, rows) in decoded.items():
        _check_rows(reader, rows, planes, name)
    return bool(decoded)


def _decoded(reader: PackedReader | WholeReader) -> tuple[PackedReader | WholeReader, np.ndarray]:
    geometry = reader.geometry
    rows = np.empty((geometry.rows, geometry.columns), geometry.number_format.storage)
    workspace = GuardedWorkspace(0xFF)
    for block in geometry.row_blocks():
        first = geometry.first_row(block)
        records, weights = reader.read(block, workspace)
        _check_backends(reader, block, weights, records)
        rows[first : first + len(weights)] = weights
    return reader, rows


def _check_backends(
    reader: PackedReader | WholeReader, block: RowBlock, weights: np.ndarray, records: np.ndarray
) -> None:
    for impl in {"scalar", "simd"} - {resolve("auto")}:
        room = guarded(weights.nbytes)
        out = room.view(weights.dtype).reshape(weights.shape)
        workspace = GuardedWorkspace(0)
        if isinstance(reader, WholeReader):
            numbers = reader.geometry.block_records(block)
            lengths, layout = reader._lengths(numbers.start, numbers.stop), reader.whole.layout
            unpack_whole(records, lengths, layout, out, impl=impl, workspace=workspace)
        else:
            first = reader.geometry.first_row(block)
            table, layout = reader._table(first, first + len(weights)), reader.packed.layout
            unpack_rows(records, table, layout, out=out, impl=impl, workspace=workspace)
        np.testing.assert_array_equal(out, weights)


def _check_rows(
    reader: PackedReader | WholeReader, rows: np.ndarray, planes: Mapping[str, bytes], name: str
) -> None:
    geometry = reader.geometry
    infinity = geometry.number_format.infinity
    if isinstance(reader, PackedReader):
        assert ((rows & geometry.number_format.key_mask) < infinity).all(), "NaN or infinity"
    assert np.count_nonzero(rows) <= reader.kept
    if rows.size > SLOW:
        return
    dense = tensor_of(rows, geometry.shape, transposed=geometry.transposed)
    np.testing.assert_array_equal(dense, _by_specification(planes, name))
    assert rows_of(dense, transposed=geometry.transposed).shape == rows.shape


def _by_specification(planes: Mapping[str, bytes], name: str) -> np.ndarray:
    meta = np.frombuffer(planes[name + META_SUFFIX], "<i8").tolist()
    return format_reader.read_tensor(planes[name], planes[name + ROWS_SUFFIX], meta)


def _taken_by_specification(planes: Mapping[str, bytes]) -> bool:
    if planes.keys() != KINDS_OF_PLANES.keys():
        return False
    meta = np.frombuffer(planes["x.emp_meta"], "<i8").tolist()
    shape = meta[13 if meta[:1] == [2] else 6 :]
    if len(shape) > 9 or any(not 0 <= size <= SLOW for size in shape):
        return False
    try:
        _by_specification(planes, "x")
    except (format_reader.DamagedError, AssertionError, ValueError, KeyError, IndexError):
        return False
    return True
