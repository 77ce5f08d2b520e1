"""Dense tensors to the planes of the packed format by our writer's own parts, and back again."""

from pathlib import Path

import numpy as np
import torch
from emp_kernels import reference
from emp_kernels.dispatch import pack_rows
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import NumberFormat
from emp_kernels.rows import PerRow, Workspace
from safetensors.torch import save_file
from support.rows import to_floats, zeros_elsewhere

from emp_llm.checkpoint.safetensors_header import read_header
from emp_llm.checkpoint.shard import Shard
from emp_llm.checkpoint.source_file import PlainFile, SourceFile
from emp_llm.tensors.geometry import Geometry
from emp_llm.tensors.packed import PackedTensor, padding
from emp_llm.tensors.packed_reader import PackedReader, open_shard


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
    records = rows.payload.tobytes()
    return {
        name: np.frombuffer(records + padding(len(records)), np.uint8),
        name + ".emp_rows": np.frombuffer(tensor.encode_table(rows.table), np.uint8),
        name + ".emp_meta": np.frombuffer(tensor.encode_meta(), np.int64),
    }


def save_planes(path: Path, planes: dict[str, np.ndarray]) -> None:
    """Write planes to a safetensors file."""
    save_file({name: torch.from_numpy(plane.copy()) for name, plane in planes.items()}, path)


def open_packed(path: Path, file: SourceFile) -> dict[str, PackedReader]:
    """Our readers of a file's packed tensors."""
    return open_shard(Shard(path.name, path, read_header(path)), file)[0]


def read_with_ours(path: Path) -> dict[str, np.ndarray]:
    """The packed tensors of a file as our reader decodes them, block by block."""
    file = PlainFile(path)
    try:
        return {name: _read(reader) for name, reader in open_packed(path, file).items()}
    finally:
        file.close()


def _read(reader: PackedReader) -> np.ndarray:
    geometry, workspace = reader.geometry, Workspace()
    rows = np.empty((geometry.rows, geometry.columns), geometry.number_format.storage)
    for block in geometry.row_blocks():
        first = geometry.first_row(block)
        weights = reader.read(block, workspace).rows
        rows[first : first + len(weights)] = weights
    return tensor_of(rows, geometry.shape, transposed=geometry.transposed)
