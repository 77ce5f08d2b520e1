"""A tensor that is written as it is."""

from collections.abc import Iterator
from functools import partial

from emp_kernels.rows import Bytes, Patterns, Workspace

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.files.checksum import COPY_BYTES, new_hash
from emp_llm.pruning.shard_writer import Entry, ShardWriter
from emp_llm.runtime.pipeline import Piece, Write
from emp_llm.tensors.geometry import Geometry, RowBlock

__all__ = ["CopyJob", "DenseRows"]


class CopyJob:
    """Copies a tensor that is not pruned.

    Attributes:
        entry: Its place in the source.
        checksum: Of its bytes, once all are copied.
    """

    def __init__(self, entry: TensorEntry, file: SourceFile, writer: ShardWriter) -> None:
        self.entry = entry
        self.checksum = new_hash()
        self._file = file
        self._writer = writer

    @staticmethod
    def entries(entry: TensorEntry) -> list[Entry]:
        """What the header will say of it."""
        return [(entry.name, entry.dtype, entry.shape, entry.nbytes)]

    def pieces(self) -> Iterator[Piece]:
        """The work; one piece at least, for an empty tensor has an entry too."""
        for start in range(self.entry.start, max(self.entry.end, self.entry.start + 1), COPY_BYTES):
            stop = min(start + COPY_BYTES, self.entry.end)
            last = stop == self.entry.end
            yield Piece(
                stop - start, partial(self._read, start, stop), partial(self._settle, last=last)
            )

    def _read(self, start: int, stop: int, workspace: Workspace) -> Bytes:
        data = workspace.take("weights", stop - start)[: stop - start]
        self._file.read_into(start, data.data)
        return data

    def _settle(self, data: Bytes, *, last: bool) -> Write:
        self.checksum.update(data.data)
        offset = self._writer.allot(data.size)
        if last:
            self._writer.add_entries(self.entries(self.entry))
        return lambda: self._writer.write(offset, data)


class DenseRows:
    """A tensor of a file whose rows come block by block, of known size.

    Args:
        entry: The tensor as the file will have it.
        geometry: How its rows run.
        writer: The file.

    Attributes:
        checksum: Of its weights, row by row, once all are placed.
    """

    def __init__(self, entry: TensorEntry, geometry: Geometry, writer: ShardWriter) -> None:
        self.checksum = new_hash()
        self._entry = entry
        self._geometry = geometry
        self._writer = writer
        self._offset = -1

    def place(self, block: RowBlock, weights: Patterns) -> Write:
        """Give a block its place; in order."""
        if self._offset < 0:
            self._offset = self._writer.allot(self._entry.nbytes)
            self._writer.add_entries(CopyJob.entries(self._entry))
        self.checksum.update(weights.data)
        return lambda: self._writer.write_rows(self._geometry, self._offset, block, weights)
