"""The smaller model as a checkpoint that is not on disk: what would be written, off the source.

So its loss can be measured before it is known whether it is the one that will be written.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from emp_kernels.rows import Workspace

from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.checkpoint.header import Header, TensorEntry
from emp_llm.checkpoint.shard import Shard
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.shrinking.cut_parts import cut_parts
from emp_llm.shrinking.cuts import Cut
from emp_llm.shrinking.plan import Shrinkage

__all__ = ["unwritten"]


def unwritten(shrinkage: Shrinkage) -> Checkpoint:
    """A checkpoint of the tensors and the config that would be written.

    Its shards have no headers on disk, and their tensors are read whole.
    """
    shards = tuple(_CutShard.of(shard, shrinkage.cuts[shard.name]) for shard in shrinkage.shards)
    return replace(shrinkage.plan.checkpoint, shards=shards, config=dict(shrinkage.config))


@dataclass(frozen=True, kw_only=True)
class _CutShard(Shard):
    """What is kept of a shard, read off the shard itself.

    Attributes:
        source: The shard.
        cuts: What is kept of its tensors, by where the result begins in this one.
    """

    source: Shard
    cuts: tuple[Cut, ...]

    @classmethod
    def of(cls, source: Shard, cuts: Sequence[Cut]) -> "_CutShard":
        """What these cuts keep, one behind the other."""
        entries, end = list[TensorEntry](), 0
        for cut in cuts:
            entry = cut.new_entry
            entries.append(replace(entry, start=end, end=end + entry.nbytes))
            end += entry.nbytes
        header = Header({}, tuple(entries), 0, end)
        made_from = source.parts
        return cls(source.name, source.path, header, made_from, source=source, cuts=tuple(cuts))

    def read_header(self) -> Header:
        """The header that it was made with: there is none on disk."""
        return self.header

    def open(self) -> SourceFile:
        """Open the source's file, to read what is kept."""
        starts = [entry.start for entry in self.header.tensors]
        return _CutFile(self.source.open(), dict(zip(starts, self.cuts, strict=True)))


class _CutFile(SourceFile):
    """What is kept of the tensors of a file.

    Args:
        file: The file.
        cuts: By where each begins here.
    """

    def __init__(self, file: SourceFile, cuts: dict[int, Cut]) -> None:
        self.name = file.name
        self._file = file
        self._cuts = cuts
        self._latest: tuple[int, bytearray] | None = None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill a buffer with the bytes of a tensor, or of a part of it, from an offset on."""
        start = max(start for start in self._cuts if start <= offset)
        cut = self._cuts[start]
        if (start, cut.new_entry.nbytes) == (offset, len(buffer)):
            self._read(cut, buffer)
            return
        # the columns of a transposed matrix are read some at a time, one stretch after the other
        latest = self._latest
        if latest is None or latest[0] != start:
            latest = start, bytearray(cut.new_entry.nbytes)
            self._read(cut, memoryview(latest[1]))
            self._latest = latest
        at = offset - start
        buffer[:] = memoryview(latest[1])[at : at + len(buffer)]

    def _read(self, cut: Cut, buffer: memoryview) -> None:
        filled, workspace = 0, Workspace()
        for part in cut_parts(cut):
            data = part.read(self._file, workspace)
            buffer[filled : filled + data.size] = data.data
            filled += data.size

    def close(self) -> None:
        """Close the file."""
        self._file.close()
