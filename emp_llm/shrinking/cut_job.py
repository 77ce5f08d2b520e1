"""A tensor of which a part is written."""

from collections.abc import Iterator
from functools import partial
from typing import Final

from emp_kernels.rows import Bytes

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.files.checksum import hash_name, new_hash
from emp_llm.pruning.copy_job import CopyJob
from emp_llm.pruning.shard_writer import ShardWriter
from emp_llm.runtime.pipeline import Piece, Write
from emp_llm.shrinking.cut_parts import cut_parts
from emp_llm.shrinking.cuts import Cut

__all__ = ["CutJob"]


class CutJob:
    """Writes what is kept of a tensor.

    Args:
        cut: The tensor.
        file: The source's file.
        writer: The new file.

    Attributes:
        entry: The tensor as it is in the new file; its offsets are not those of either file.
        statistics: None; nothing is pruned.
        packed_bytes: None; nothing is packed.
    """

    statistics: Final = None
    packed_bytes: Final = None

    def __init__(self, cut: Cut, file: SourceFile, writer: ShardWriter) -> None:
        self.entry: TensorEntry = cut.new_entry
        self._cut = cut
        self._hash = new_hash()
        self._file = file
        self._writer = writer

    @property
    def checksum(self) -> str:
        """Checksum of its bytes, once all are written."""
        return hash_name(self._hash)

    def pieces(self) -> Iterator[Piece]:
        """The work, in order."""
        for part in cut_parts(self._cut):
            yield Piece(part.nbytes, partial(part.read, self._file), self._settle)
        yield Piece.note(lambda: self._writer.add_entries(CopyJob.entries(self.entry)))

    def _settle(self, data: Bytes) -> Write:
        self._hash.update(data.data)
        offset = self._writer.allot(data.size)
        return lambda: self._writer.write(offset, data)
