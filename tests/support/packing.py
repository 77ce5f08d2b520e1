"""Dense tensors to the planes of the packed format by our writer's own parts, and back again."""

from pathlib import Path

import numpy as np
import torch
from emp_kernels import reference
from emp_kernels.dispatch import pack_rows, pack_whole
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import F16, NumberFormat
from emp_kernels.rows import PerRow, Workspace
from emp_kernels.whole_layout import WholeLayout
from safetensors.torch import save_file
from support.rows import lists_of, to_floats, zeros_elsewhere

from emp_llm.checkpoint.safetensors_header import read_header
from emp_llm.checkpoint.shard import Shard
from emp_llm.checkpoint.source_file import PlainFile, SourceFile
from emp_llm.tensors.geometry import Geometry, WholeGeometry
from emp_llm.tensors.packed import PackedTensor, padding
from emp_llm.tensors.packed_reader import PackedReader, open_shard
from emp_llm.tensors.whole import WholeTensor
from emp_llm.tensors.whole_reader import WholeReader


def rows_of(dense: np.ndarray, *, transposed: bool = False) -> np.ndarray:
    """The rows of all matrices of a tensor, [R, C]."""
    matrices = dense.reshape(-1, *dense.shape[-2:])
    if transposed:
        matrices = matrices.swapaxes(1, 2)
    return np.ascontiguousarray(matrices.reshape(-1, matrices.shape[-1]))


def tensor_of(rows: np.ndarray, shape: tuple[int, ...], *, transposed: bool = False) -> np.ndarray:
    """The inverse of `rows_of`."""
    if not transposed:
        return rows.reshape(shape)
    *stack, columns, out = shape
    return rows.reshape(*stack, out, columns).swapaxes(-1, -2)


def prune(
    dense: np.ndarray, number_format: NumberFormat, beta: float, *, transposed: bool = False
) -> np.ndarray:
    """The tensor with +0.0 for what the reference rule takes out of its rows."""
    rows = rows_of(dense, transposed=transposed)
    scores = np.abs(to_floats(rows, number_format))
    keep = np.array([reference.keep_mask(row, beta) for row in scores])
    return tensor_of(zeros_elsewhere(rows, keep), dense.shape, transposed=transposed)


def pack(
    name: str,
    dense: np.ndarray,
    number_format: NumberFormat,
    *,
    beta: float = 1.0,
    transposed: bool = False,
    dropped_bits: int = 0,
    radix: int = 3,
    align: int = 1,
) -> dict[str, np.ndarray]:
    """The planes of a tensor, by name."""
    geometry = Geometry(number_format=number_format, shape=dense.shape, transposed=transposed)
    layout = RowLayout(
        number_format=number_format,
        columns=geometry.columns,
        dropped_bits=dropped_bits,
        radix=radix,
        align=align,
    )
    tensor = PackedTensor(geometry, layout)
    rows = pack_rows(rows_of(dense, transposed=transposed), layout, PerRow(beta))
    return _planes(name, rows.payload.tobytes(), tensor.encode_table(rows.table), tensor)


def whole_tensor(
    shape: tuple[int, ...],
    number_format: NumberFormat,
    *,
    record_rows: int = 2,
    widths: tuple[int, ...] = (1, 2),
    exponents: tuple[int, ...] = (),
    dropped_bits: int = 0,
) -> WholeTensor:
    """A packed tensor that is not pruned; its code is for weights around ½ unless it is told.

    `exponents` is the first list; those of further contexts are as `lists_of` makes them.
    """
    geometry = WholeGeometry(number_format=number_format, shape=shape, record_rows=record_rows)
    half, last = (14, 31) if number_format is F16 else (126, 255)
    usual = [*range(half, -1, -1), *range(half + 1, last + 1)]
    layout = WholeLayout(
        number_format=number_format,
        weights=geometry.record_weights,
        widths=widths,
        exponents=lists_of(
            exponents or usual[: sum((1 << width) - 1 for width in widths)],
            number_format.mantissa_bits - dropped_bits,
        ),
        dropped_bits=dropped_bits,
    )
    return WholeTensor(geometry, layout)


def pack_all(name: str, dense: np.ndarray, tensor: WholeTensor) -> dict[str, np.ndarray]:
    """The planes of a tensor of which all weights stay, by name."""
    packed = pack_whole(dense, tensor.layout)
    return _planes(name, packed.payload.tobytes(), tensor.encode_table(packed.lengths), tensor)


def _planes(
    name: str, records: bytes, table: bytes, tensor: PackedTensor | WholeTensor
) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer(records + padding(len(records)), np.uint8),
        name + ".emp_rows": np.frombuffer(table, np.uint8),
        name + ".emp_meta": np.frombuffer(tensor.encode_meta(), np.int64),
    }


def save_planes(path: Path, planes: dict[str, np.ndarray]) -> None:
    """Write planes to a safetensors file."""
    save_file({name: torch.from_numpy(plane.copy()) for name, plane in planes.items()}, path)


def open_packed(path: Path, file: SourceFile) -> dict[str, PackedReader | WholeReader]:
    """Our readers of a file's packed tensors."""
    return open_shard(Shard(path.name, path, read_header(path)), file)[0]


def read_with_ours(path: Path) -> dict[str, np.ndarray]:
    """The packed tensors of a file as our reader decodes them, block by block."""
    file = PlainFile(path)
    try:
        return {name: _read(reader) for name, reader in open_packed(path, file).items()}
    finally:
        file.close()


def _read(reader: PackedReader | WholeReader) -> np.ndarray:
    geometry, workspace = reader.geometry, Workspace()
    rows = np.empty((geometry.rows, geometry.columns), geometry.number_format.storage)
    for block in geometry.row_blocks():
        first = geometry.first_row(block)
        weights = reader.read(block, workspace).rows
        rows[first : first + len(weights)] = weights
    return tensor_of(rows, geometry.shape, transposed=geometry.transposed)
