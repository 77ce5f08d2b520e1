"""Reads a base once: the checksum of its weights, and which tensors another checkpoint has too."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
from emp_kernels.rows import Bytes, Workspace

from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.shard import Shard
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.files.checksum import COPY_BYTES, hash_name, new_hash
from emp_llm.runtime.pipeline import Piece
from emp_llm.runtime.workers import Workers

__all__ = ["Surveyed", "survey"]


class Surveyed(NamedTuple):
    """What was found of a base.

    Attributes:
        hash: Checksum of all its tensors, with the name of the algorithm: of the name, dtype,
            shape and bytes of each, by name, however they are spread over shards.
        same: Names of the tensors that the other checkpoint has too, the same to the bit.
    """

    hash: str
    same: frozenset[str]


def survey(
    base: Checkpoint,
    workers: Workers,
    others: Mapping[str, tuple[Shard, TensorEntry]] | None = None,
    files: OpenFiles | None = None,
) -> Surveyed:
    """Read all tensors of a base, each once.

    Args:
        base: The base.
        workers: What reads it.
        others: Tensors of another checkpoint to compare with the base's of the same name.
        files: The files of these.

    Raises:
        CheckpointError: If a file cannot be read.
    """
    others = others or {}
    reading = _Reading()
    workers.progress.begin("reading the base", base.nbytes)
    with OpenFiles() as base_files:

        def pieces() -> Iterator[Piece]:
            for name, (shard, entry) in sorted(base.tensors.items()):
                other = None
                if name in others and files is not None:
                    other_shard, other_entry = others[name]
                    if (other_entry.dtype, other_entry.shape) == (entry.dtype, entry.shape):
                        other = files.file(other_shard), other_entry.start
                yield from reading.pieces(base_files.file(shard), entry, other)

        workers.run(pieces(), lambda: None if files is None else files.abandon())
    return Surveyed(hash_name(reading.hash), frozenset(reading.same))


class _Part(NamedTuple):
    """Some bytes of a base's tensor, and whether the other tensor has the same ones."""

    data: Bytes
    same: bool


class _Reading:
    """The tensors that were read so far, in order."""

    def __init__(self) -> None:
        self.hash = new_hash()
        self.same: set[str] = set()

    def pieces(
        self, file: SourceFile, entry: TensorEntry, other: tuple[SourceFile, int] | None
    ) -> Iterator[Piece]:
        """The work on one tensor: each part hashed, and compared with the other file's."""
        yield Piece.note(partial(self._begin, entry, compared=other is not None))
        for start in range(0, entry.nbytes, COPY_BYTES):
            stop = min(start + COPY_BYTES, entry.nbytes)
            read = partial(_read, file, entry.start, other, start, stop)
            yield Piece(stop - start, read, partial(self._take, entry.name))

    def _begin(self, entry: TensorEntry, *, compared: bool) -> None:
        self.hash.update(repr((entry.name, entry.dtype, entry.shape)).encode())
        if compared:
            self.same.add(entry.name)

    def _take(self, name: str, part: _Part) -> None:
        self.hash.update(part.data.data)
        if not part.same:
            self.same.discard(name)


def _read(
    file: SourceFile,
    at: int,
    other: tuple[SourceFile, int] | None,
    start: int,
    stop: int,
    workspace: Workspace,
) -> _Part:
    data = workspace.take("weights", stop - start)[: stop - start]
    file.read_into(at + start, data.data)
    if other is None:
        return _Part(data, same=False)
    other_file, other_at = other
    other_data = workspace.take("other weights", stop - start)[: stop - start]
    other_file.read_into(other_at + start, other_data.data)
    return _Part(data, bool(np.array_equal(data, other_data)))
