"""A tensor that is copied, byte for byte."""

from collections.abc import Iterator
from functools import partial
from typing import Final

from emp_kernels.rows import Bytes, Workspace

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.files.checksum import COPY_BYTES, hash_name, new_hash
from emp_llm.pruning.shard_writer import Entry, ShardWriter
from emp_llm.runtime.pipeline import Piece, Write

__all__ = ["CopyJob"]


class CopyJob:
    """Copies a tensor.

    Args:
        entry: Its place in the source.
        file: The source's file.
        writer: The new file.

    Attributes:
        entry: Its place in the source.
        statistics: None; nothing is pruned.
        packed_bytes: None; nothing is packed.
    """

    statistics: Final = None
    packed_bytes: Final = None

    def __init__(self, entry: TensorEntry, file: SourceFile, writer: ShardWriter) -> None:
        self.entry = entry
        self._hash = new_hash()
        self._file = file
        self._writer = writer

    @property
    def checksum(self) -> str:
        """Checksum of its bytes, once all are copied."""
        return hash_name(self._hash)

    @staticmethod
    def entries(entry: TensorEntry) -> list[Entry]:
        """Its entries in the new file's header."""
        return [(entry.name, entry.dtype, entry.shape, entry.nbytes)]

    def pieces(self) -> Iterator[Piece]:
        """The work, in order; at least one piece, because an empty tensor has an entry too."""
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
        self._hash.update(data.data)
        offset = self._writer.allot(data.size)
        if last:
            self._writer.add_entries(self.entries(self.entry))
        return lambda: self._writer.write(offset, data)
