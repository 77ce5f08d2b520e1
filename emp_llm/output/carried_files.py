"""The files of a source that travel with its weights, copied byte for byte.

Files of more than `COPY_BYTES` are written as shards are: in parts, past the page cache, each
recorded in the journal once it is on disk, so that a run that is resumed does not copy it again.
"""

import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from emp_kernels.rows import Bytes, Workspace

from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.checkpoint.regular_file import open_regular
from emp_llm.checkpoint.source_file import PlainFile
from emp_llm.errors import CheckpointError
from emp_llm.files.checksum import COPY_BYTES, hash_name, new_hash
from emp_llm.files.direct_file import Flusher
from emp_llm.files.placed_file import PlacedFile
from emp_llm.output.journal import Journal
from emp_llm.report.fields import FileCount, FileFields
from emp_llm.report.file_names import OF_THEIR_OWN
from emp_llm.report.folder_files import describe_file
from emp_llm.runtime.pipeline import Piece, Write
from emp_llm.runtime.workers import Workers

__all__ = ["carried_files", "carry_files", "count_files"]


def carried_files(source: Checkpoint) -> list[Path]:
    """Paths, relative to a source's folder, of the files that are copied from it; sorted."""
    return [relative for relative in source.other_files if str(relative) not in OF_THEIR_OWN]


def count_files(source: Checkpoint) -> FileCount:
    """How many files are copied from a source, and their size."""
    sizes = [_size(source, relative) for relative in carried_files(source)]
    return {"files": len(sizes), "bytes": sum(sizes)}


def carry_files(
    folder: Path, source: Checkpoint, workers: Workers, journal: Journal | None = None
) -> dict[str, FileFields]:
    """Copy a source's `carried_files`; large ones that an earlier run has copied are kept.

    Args:
        folder: The folder to write to.
        source: The checkpoint that they are taken from.
        workers: What copies large files.
        journal: Records large files that are copied; None for a run that cannot be resumed.

    Returns:
        What a report says of the large files, by their paths.

    Raises:
        CheckpointError: If one cannot be read, or has a name that the output needs.
        OSError: If one cannot be written.
    """
    files = carried_files(source)
    large = {file for file in files if _size(source, file) > COPY_BYTES}
    known = _copied_before(folder, large, journal, workers)
    for file in files:
        if file not in known:
            _make_room(folder, file)
        if file not in large:
            _copy_small(folder, source, file)
    to_do = sorted(large.difference(known))
    if to_do:
        workers.progress.begin("copying", sum(_size(source, file) for file in to_do))
        known |= _copy_large(folder, source, to_do, workers, journal)
    return {file.as_posix(): fields for file, fields in known.items()}


def _size(source: Checkpoint, file: Path) -> int:
    return source.beside.travelling[file.as_posix()]


def _make_room(folder: Path, file: Path) -> None:
    """Make the folder that a file is copied to; no file of the output has its name."""
    if (folder / file).exists():
        raise CheckpointError(
            f"{file}: has the name of a file of the pruned model; rename it or take it away"
        )
    (folder / file).parent.mkdir(parents=True, exist_ok=True)


def _copy_small(folder: Path, source: Checkpoint, file: Path) -> None:
    try:
        data = open_regular(source.folder / file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
    with data, (folder / file).open("xb") as copy:
        shutil.copyfileobj(data, copy)


def _copied_before(
    folder: Path, large: Collection[Path], journal: Journal | None, workers: Workers
) -> dict[Path, FileFields]:
    """The large files that an earlier run has copied; those that were damaged since are removed."""
    recorded = {} if journal is None else journal.copied()
    found = {file: fields for file in sorted(large) if (fields := recorded.get(file.as_posix()))}
    if found:
        workers.progress.begin("checking", sum(fields["bytes"] for fields in found.values()))
    for file, fields in list(found.items()):
        if describe_file(folder / file) != fields:
            (folder / file).unlink()
            del found[file]
        workers.advance(fields["bytes"])
    return found


def _copy_large(
    folder: Path,
    source: Checkpoint,
    files: Collection[Path],
    workers: Workers,
    journal: Journal | None,
) -> dict[Path, FileFields]:
    copies: dict[Path, _Copy] = {}
    # the flusher ends first: a file is released when nothing writes to it any more
    with ExitStack() as opened, Flusher() as flusher:

        def pieces() -> Iterator[Piece]:
            for file in files:
                copy = copies[file] = _Copy(folder, source, file, flusher, journal)
                opened.callback(copy.release)
                yield from copy.pieces()

        workers.run(pieces(), lambda: None)
    return {file: copy.fields for file, copy in copies.items()}


class _Copy:
    """Copies one large file.

    Args:
        folder: The folder to write to.
        source: The checkpoint.
        file: The file's path in both.
        flusher: The thread that waits for the disk.
        journal: Where it is recorded, once it is on disk.
    """

    def __init__(
        self,
        folder: Path,
        source: Checkpoint,
        file: Path,
        flusher: Flusher,
        journal: Journal | None,
    ) -> None:
        self._name = file.as_posix()
        self._journal = journal
        self._hash = new_hash()
        self._nbytes = _size(source, file)
        path = source.folder / file
        if not path.is_file() or path.stat().st_size != self._nbytes:
            raise CheckpointError(
                f"{file}: has changed since this run began; leave it alone and start again"
            )
        self._from = PlainFile(path)
        try:
            self._to = PlacedFile(folder / file, flusher, finished=self._record)
        except OSError:
            self._from.close()
            raise

    @property
    def fields(self) -> FileFields:
        """What a report says of it, once all pieces are settled."""
        return {"bytes": self._nbytes, "hash": hash_name(self._hash)}

    def pieces(self) -> Iterator[Piece]:
        """The work, in order."""
        for start in range(0, self._nbytes, COPY_BYTES):
            stop = min(start + COPY_BYTES, self._nbytes)
            yield Piece(stop - start, partial(self._read, start, stop), self._settle)
        yield Piece.note(self._to.close_when_written)

    def release(self) -> None:
        """Close both files."""
        self._to.release()
        self._from.close()

    def _read(self, start: int, stop: int, workspace: Workspace) -> Bytes:
        data = workspace.take("weights", stop - start)[: stop - start]
        self._from.read_into(start, data.data)
        return data

    def _settle(self, data: Bytes) -> Write:
        self._hash.update(data.data)
        offset = self._to.allot(data.size)
        return lambda: self._to.write(offset, data)

    def _record(self) -> None:
        if self._journal is not None:
            self._journal.record_copy(self._name, self.fields)
