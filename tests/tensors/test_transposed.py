"""Columns become rows, bit for bit, and rows that are columns of a file come and go as such."""

from pathlib import Path

import numpy as np
import pytest
from emp_kernels.dispatch import Impl, turn
from emp_kernels.numbers import BF16, F32, NumberFormat
from support.rows import GuardedWorkspace, guarded

from emp_llm.checkpoint.source_file import PlainFile
from emp_llm.tensors import geometry as geometry_module
from emp_llm.tensors.geometry import Geometry

widths = pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
impls = pytest.mark.parametrize("impl", ["reference", "auto"])

EDGES = (1, 3, 4, 7, 8, 9, 63, 64, 65, 127, 128, 129, 260)
"""Below, at and past what a vector and a tile hold of items of both widths."""


def counted(lines: int, width: int, dtype: type, *, start: int = 1) -> np.ndarray:
    """A matrix whose items all differ, as far as their width allows; its end is guarded."""
    size = lines * width
    memory = guarded(size * np.dtype(dtype).itemsize).view(dtype)
    memory[:] = np.arange(start, start + size)
    return memory.reshape(lines, width)


@impls
@widths
@pytest.mark.parametrize("lines", EDGES)
def test_columns_become_rows(lines: int, dtype: type, impl: Impl) -> None:
    for width in EDGES:
        matrix = counted(lines, width, dtype)
        out = counted(width, lines, dtype, start=7)
        turn(matrix, out, impl=impl)
        assert out.tolist() == [list(column) for column in zip(*matrix.tolist(), strict=True)]


@impls
@widths
def test_lines_that_lie_apart_are_turned_and_what_is_between_them_stays(
    dtype: type, impl: Impl
) -> None:
    wide = counted(70, 300, dtype)
    around = np.zeros((150, 100), dtype)
    turn(wide[:, 101:251], around[:, 13:83], impl=impl)
    assert (around[:, 13:83] == wide[:, 101:251].T).all()
    assert not around[:, :13].any()
    assert not around[:, 83:].any()


@impls
@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_nothing_is_turned_to_nothing(shape: tuple[int, int], impl: Impl) -> None:
    turn(np.empty(shape, np.uint16), np.empty(shape[::-1], np.uint16), impl=impl)


@impls
@pytest.mark.parametrize(
    ("matrix", "out"),
    [
        (np.zeros((3, 5), np.uint16), np.zeros((3, 5), np.uint16)),
        (np.zeros((3, 5), np.uint16), np.zeros((5, 3), np.uint32)),
        (np.zeros((3, 10), np.uint16)[:, ::2], np.zeros((5, 3), np.uint16)),
        (np.zeros((3, 5), np.uint16), np.zeros((3, 5), np.uint16).T),
        (np.zeros((3, 5), np.uint16)[::-1], np.zeros((5, 3), np.uint16)),
        (np.broadcast_to(np.zeros(5, np.uint16), (3, 5)), np.zeros((5, 3), np.uint16)),
    ],
    ids=["shape", "width", "items apart", "turned already", "backwards", "one line many times"],
)
def test_what_is_no_matrix_of_lines_is_refused(
    matrix: np.ndarray, out: np.ndarray, impl: Impl
) -> None:
    with pytest.raises(ValueError, match="must"):
        turn(matrix, out, impl=impl)


@pytest.mark.parametrize("number_format", [BF16, F32], ids=lambda f: f.name)
@pytest.mark.parametrize("block_rows", [3, 40])
def test_blocks_of_columns_are_read_and_placed_some_columns_at_a_time(
    number_format: NumberFormat, block_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns, rows, dtype = 300, 40, number_format.storage.type
    monkeypatch.setattr(geometry_module, "_TURNED_BYTES", 1)
    monkeypatch.setattr(
        geometry_module,
        "TRANSPOSED_ROW_BLOCK_BYTES",
        block_rows * columns * np.dtype(dtype).itemsize,
    )
    stored = counted(2 * columns, rows, dtype).reshape(2, columns, rows)
    path = tmp_path / "file"
    path.write_bytes(b"before" + stored.tobytes())
    geometry = Geometry(number_format=number_format, shape=stored.shape, transposed=True)
    written = bytearray(len(path.read_bytes()))
    file = PlainFile(path)
    for block in geometry.row_blocks():
        read = np.zeros((block.stop - block.start, columns), dtype)
        geometry.read(file, 6, block, read, GuardedWorkspace(0))
        assert (read == stored[block.matrix, :, block.start : block.stop].T).all()
        for at, data in geometry.placed(6, block, read):
            written[at : at + data.size] = data.tobytes()
    file.close()
    assert written[6:] == stored.tobytes()
