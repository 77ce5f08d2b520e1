"""How the rows of a tensor lie in its file, and how row blocks are read and written.

A row is always the weights into one output neuron. In nn.Linear's [out, in], rows lie one after the
other. In Conv1D's [in, out], and in experts fused that way, they are columns of the stored matrix:
the tensor is transposed. Tensors of three or more dimensions are stacks of matrices, [E, out, in]
or [E, in, out].
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from emp_kernels.dispatch import turn
from emp_kernels.numbers import NumberFormat
from emp_kernels.rows import Bytes, Patterns, Workspace

from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.errors import CheckpointError

__all__ = ["ROW_BLOCK_BYTES", "Geometry", "RowBlock", "WholeGeometry"]

ROW_BLOCK_BYTES = 4 << 20
"""Bytes of a row block, or one row if that is longer: few enough to stay in a CPU's cache."""

TRANSPOSED_ROW_BLOCK_BYTES = 32 << 20
"""The same of a transposed tensor. There a row block is some columns of the stored matrix, which
takes a read for each of its lines unless all columns fit; so these row blocks are larger.

Whole matrices of GPT-2 XL and of gpt-oss's experts fit, in 16 bits.
"""

_TURNED_BYTES = 1 << 20
"""Bytes of such a row block that are transposed at a time: they stay in one core's cache."""

_TURNED_COLUMNS = 128
"""Columns that are transposed at a time at least, so that pieces of rows fill whole cache lines."""

_MOST_BLOCK_ROWS = 1 << 16  # what belongs to a row, such as its line of the table, takes memory too

_MOST_MATRICES = 1 << 16  # more than a hundred times the experts of a layer
_MOST_ROWS = 1 << 24  # six times those of a layer's 384 experts of 7,168 neurons, stored as one
_MOST_COLUMNS = 1 << 22  # a hundred times the inputs of any layer


@dataclass(frozen=True)
class RowBlock:
    """Rows start to stop of one matrix of a tensor."""

    matrix: int
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """A tensor seen as matrices of rows.

    Attributes:
        number_format: Format of the weights.
        shape: The tensor's shape in the file, two dimensions or more.
        transposed: Whether rows run along the last dimension but one, so that they are columns of
            the stored matrices.

    Raises:
        CheckpointError: If there are more matrices, rows or columns than in any model. A few bytes
            of a header can claim any number of them, and some memory is needed for each row and for
            all columns.
    """

    number_format: NumberFormat
    shape: tuple[int, ...]
    transposed: bool = False

    def __post_init__(self) -> None:
        for what, count, most in (
            ("matrices", self.matrices, _MOST_MATRICES),
            ("rows", self.rows, _MOST_ROWS),
            ("columns", self.columns, _MOST_COLUMNS),
        ):
            if count > most:
                raise CheckpointError(
                    f"the shape {list(self.shape)} has {count:,} {what}; emp-llm takes up to "
                    f"{most:,}: leave the tensor out with --ignore"
                )

    @property
    def matrices(self) -> int:
        """Matrices in the stack, E."""
        return math.prod(self.shape[:-2])

    @property
    def matrix_rows(self) -> int:
        """Rows of one matrix: output neurons."""
        return self.shape[-1] if self.transposed else self.shape[-2]

    @property
    def columns(self) -> int:
        """Weights in a row: inputs of a neuron."""
        return self.shape[-2] if self.transposed else self.shape[-1]

    @property
    def rows(self) -> int:
        """Rows of all matrices."""
        return self.matrices * self.matrix_rows

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.columns * self.number_format.item_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.rows * self.row_bytes

    def row_blocks(self) -> Iterator[RowBlock]:
        """The tensor's rows in order, as row blocks.

        They depend on nothing but the geometry: what is written must not depend on the machine.
        """
        step = self._block_rows
        for matrix in range(self.matrices):
            for start in range(0, self.matrix_rows, step):
                yield RowBlock(matrix, start, min(start + step, self.matrix_rows))

    def block_number(self, block: RowBlock) -> int:
        """The number of a row block among `row_blocks`, from 0."""
        a_matrix = -(-self.matrix_rows // self._block_rows)
        return block.matrix * a_matrix + block.start // self._block_rows

    @property
    def _block_rows(self) -> int:
        size = TRANSPOSED_ROW_BLOCK_BYTES if self.transposed else ROW_BLOCK_BYTES
        return min(max(1, size // self.row_bytes), _MOST_BLOCK_ROWS)

    def block_bytes(self, block: RowBlock) -> int:
        """Bytes of a row block's weights."""
        return (block.stop - block.start) * self.row_bytes

    def first_row(self, block: RowBlock) -> int:
        """The number of a row block's first row among all rows of the tensor."""
        return block.matrix * self.matrix_rows + block.start

    def read(
        self, file: SourceFile, offset: int, block: RowBlock, memory: Patterns, workspace: Workspace
    ) -> None:
        """Read the rows of a row block.

        Args:
            file: The file that holds the tensor.
            offset: Where the tensor starts in it, in bytes.
            block: Which rows.
            memory: Where to put their bit patterns, uint16 or uint32 [rows, columns],
                C-contiguous.
            workspace: Buffers to use again.
        """
        if not self.transposed:
            at = offset + self.first_row(block) * self.row_bytes
            file.read_into(at, _bytes(memory).data)
            return
        for columns in self._turned_at_once(block):
            turned = memory[:, columns.start : columns.stop]
            flat = workspace.take("columns", turned.nbytes)[: turned.nbytes]
            for at, start, stop in self._stretches(offset, block, columns):
                file.read_into(at, flat.data[start:stop])
            turn(flat.view(memory.dtype).reshape(turned.shape[::-1]), turned)

    def placed(
        self, offset: int, block: RowBlock, weights: Patterns
    ) -> Iterator[tuple[int, Bytes]]:
        """Where the rows of a row block are to be written, so that `read` finds them.

        Args:
            offset: Where the tensor starts in the file, in bytes.
            block: Which rows.
            weights: Their bit patterns, [rows, columns], C-contiguous.

        Yields:
            Offsets in the file, each with the uint8 data that goes there. The data is overwritten
            when the next is asked for.
        """
        if not self.transposed:
            yield offset + self.first_row(block) * self.row_bytes, _bytes(weights)
            return
        buffer = np.empty(0, weights.dtype)
        for columns in self._turned_at_once(block):
            rows = weights[:, columns.start : columns.stop]
            if buffer.size < rows.size:
                buffer = np.empty(rows.size, weights.dtype)
            turned = buffer[: rows.size].reshape(rows.shape[::-1])
            turn(rows, turned)
            flat = _bytes(turned)
            for at, start, stop in self._stretches(offset, block, columns):
                yield at, flat[start:stop]

    def _turned_at_once(self, block: RowBlock) -> Iterator[range]:
        """Ranges of the columns, in order, which of a transposed row block are turned at a time."""
        column_bytes = (block.stop - block.start) * self.number_format.item_bytes
        some = max(1, _TURNED_BYTES // (column_bytes * _TURNED_COLUMNS)) * _TURNED_COLUMNS
        for start in range(0, self.columns, some):
            yield range(start, min(start + some, self.columns))

    def _stretches(
        self, offset: int, block: RowBlock, columns: range
    ) -> Iterator[tuple[int, int, int]]:
        """Where the columns of a transposed row block lie.

        Yields:
            The offset in the file, and the first byte and the one behind the last of what lies
            there, among the bytes of all these columns.
        """
        item = self.number_format.item_bytes
        line = self.matrix_rows * item
        first = offset + (block.matrix * self.columns + columns.start) * line + block.start * item
        width = (block.stop - block.start) * item
        if width == line:  # the row block is all of the matrix, so its columns are contiguous
            yield first, 0, len(columns) * line
            return
        for column in range(len(columns)):
            yield first + column * line, column * width, (column + 1) * width


@dataclass(frozen=True, kw_only=True)
class WholeGeometry(Geometry):
    """A tensor that is not pruned, seen as rows of its last dimension, as they lie in the file.

    Such rows are no neurons: all of them belong to one matrix, and none is transposed.

    Attributes:
        record_rows: Rows that are packed in one record; a row block never parts them.
    """

    record_rows: int

    @property
    def matrices(self) -> int:
        """One."""
        return 1

    @property
    def matrix_rows(self) -> int:
        """All rows of the tensor."""
        return math.prod(self.shape[:-1])

    @property
    def record_weights(self) -> int:
        """Weights of a record; the tensor's last one may have fewer."""
        return self.record_rows * self.columns

    @property
    def records(self) -> int:
        """Records of the tensor."""
        return -(-self.matrix_rows // self.record_rows)

    def block_records(self, block: RowBlock) -> range:
        """The records that hold a row block, which starts with the first of a record's rows."""
        return range(block.start // self.record_rows, -(-block.stop // self.record_rows))

    @property
    def _block_rows(self) -> int:
        rows = super()._block_rows
        return max(rows // self.record_rows, 1) * self.record_rows


def _bytes(weights: Patterns) -> Bytes:
    return weights.reshape(-1).view(np.uint8)
