"""The loop that writes shards: every shard of the source becomes one file, tensor by tensor.

source file → jobs, one a tensor → pieces of work → ShardWriter → Flusher → finished
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.shard import Shard
from emp_llm.files.direct_file import Flusher
from emp_llm.pruning.shard_writer import Entry, ShardWriter
from emp_llm.report.tensor_statistics import TensorStatistics
from emp_llm.runtime.pipeline import Piece

__all__ = ["NewFile", "ShardOutput", "WriteJob", "shard_output"]


class WriteJob(Protocol):
    """Writes one tensor of a new file."""

    @property
    def entry(self) -> TensorEntry:
        """The tensor's name, dtype and shape, as they are when it is not packed."""

    @property
    def statistics(self) -> TensorStatistics | None:
        """What pruning did to the tensor, once all pieces are settled; None if it was copied."""

    @property
    def packed_bytes(self) -> int | None:
        """Bytes that were written if it was packed without being pruned; None otherwise."""

    @property
    def checksum(self) -> str:
        """Checksum of what was written, once all pieces are settled, as reports hold it."""

    def pieces(self) -> Iterator[Piece]:
        """The work, in order."""


@dataclass(frozen=True, kw_only=True)
class NewFile:
    """What a file of weights is going to hold.

    Attributes:
        name: Its name.
        entries_at_most: Its header's entries, none of them smaller than they will be.
        in_order: Whether it is written from its beginning to its end, roughly.
        jobs: Makes the jobs that write its tensors, in order.
    """

    name: str
    entries_at_most: Iterable[Entry]
    in_order: bool
    jobs: Callable[[ShardWriter], Iterable[WriteJob]]


class ShardOutput:
    """Files being written, each in the place of one shard of the source; see `shard_output`."""

    def __init__(
        self, folder: Path, files: OpenFiles, flusher: Flusher, writers: ExitStack
    ) -> None:
        self._folder = folder
        self._files = files
        self._flusher = flusher
        self._writers = writers

    def pieces(
        self,
        shard: Shard,
        new: NewFile,
        finished: Callable[[Sequence[WriteJob]], None] = lambda _jobs: None,
    ) -> Iterator[Piece]:
        """The work that writes one file; afterwards the source's file is closed.

        Args:
            shard: The source.
            new: The file.
            finished: Called with the jobs, from the flusher's thread, when the file is on disk
                under its name.
        """
        jobs: list[WriteJob] = []
        writer = ShardWriter(
            self._folder / new.name,
            new.entries_at_most,
            shard.header.metadata,
            self._flusher,
            in_order=new.in_order,
            finished=partial(finished, jobs),
        )
        self._writers.callback(writer.release)
        for job in new.jobs(writer):
            jobs.append(job)
            yield from job.pieces()
        yield Piece.note(writer.close_when_written)
        yield Piece.note(partial(self._files.done, shard))


@contextmanager
def shard_output(folder: Path, files: OpenFiles) -> Iterator[ShardOutput]:
    """Write shards to a folder; leaving the block waits until all of them are on disk.

    Args:
        folder: The folder.
        files: The source's files.

    Raises:
        OSError: If a file cannot be written.
    """
    # the flusher ends first: a writer is released when nothing writes to its file any more
    with ExitStack() as writers, Flusher() as flusher:
        yield ShardOutput(folder, files, flusher, writers)
