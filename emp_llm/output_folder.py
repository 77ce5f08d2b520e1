"""The folder that a run writes: whole, or not there.

Everything is written to a hidden folder inside it, on the same file system, and moved up at the
end, the files that make it look like a model last.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from emp_llm.checkpoint import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME, read_index
from emp_llm.companions import REPORT_NAME
from emp_llm.errors import CheckpointError, OutputError

__all__ = ["STAGING_NAME", "OutputFolder"]

STAGING_NAME = ".emp-llm-unfinished"

_REPLACED = "replaced"
_LAST = (REPORT_NAME, INDEX_NAME, CONFIG_NAME)


class OutputFolder:
    """A folder being written, as a context manager.

    Leaving the ``with`` block without `publish`, or with an error, takes away all that was
    written, and the folder too if it was not there before. OSErrors that leave it come out as
    OutputErrors.

    Args:
        path: The folder to make.
        overwrite: Whether to replace a checkpoint that is there.
        source: The folder that is read from, which must be another one.
    """

    def __init__(self, path: Path, *, overwrite: bool, source: Path) -> None:
        self.path = path
        self._overwrite = overwrite
        self._source = source
        self._made: list[Path] = []
        self._moves: list[tuple[Path, Path]] = []
        self._lock = -1

    @property
    def staging(self) -> Path:
        """The hidden folder that files are written to."""
        return self.path / STAGING_NAME

    def __enter__(self) -> "OutputFolder":
        self._check()
        try:
            self._make(self.staging)
            self._take_lock()
            for leftover in self.staging.iterdir():
                _remove(leftover)
        except OSError as error:
            self._clean_up()
            raise self._explain(error) from error
        except OutputError:
            self._remove_made()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._clean_up()
        if isinstance(error, OSError):
            raise self._explain(error) from error

    def publish(self) -> None:
        """Move everything to its place; the checkpoint that is replaced goes first.

        If a move fails, all of them are taken back.
        """
        new = [path.relative_to(self.staging) for path in self.staging.rglob("*") if path.is_file()]
        new.sort(key=lambda file: (_LAST.index(str(file)) if str(file) in _LAST else -1, file))
        for file in new:
            _fsync(self.staging / file)
        if self._overwrite:
            self._set_aside(new)
        for file in new:
            self._move(self.staging / file, self.path / file)
        _fsync(self.path)
        self._moves.clear()
        self._made.clear()

    def _set_aside(self, new: Iterable[Path]) -> None:
        """Put what belongs to the older checkpoint, or is in the way, where it will be deleted."""
        older = {file for file in new if (self.path / file).is_file()}
        older |= {Path(name) for name in (CONFIG_NAME, REPORT_NAME, INDEX_NAME, WEIGHTS_NAME)}
        with suppress(CheckpointError):  # a damaged index names nothing
            older |= {Path(name) for name in read_index(self.path / INDEX_NAME)[0].values()}
        for file in sorted(older, key=lambda file: str(file) != CONFIG_NAME):
            if (self.path / file).is_file():
                self._move(self.path / file, self.staging / _REPLACED / file)

    def _move(self, source: Path, target: Path) -> None:
        for folder in (source.parent, target.parent):
            self._check_inside(folder)
        self._make(target.parent)
        self._moves.append((source, target))
        source.replace(target)

    def _check_inside(self, folder: Path) -> None:
        """Refuse a link in the folder that would lead to files elsewhere."""
        if not folder.resolve().is_relative_to(self.path.resolve()):
            raise OutputError(f"{folder}: is a link out of {self.path}: remove it")

    def _take_back(self) -> None:
        for source, target in reversed(self._moves):
            if target.exists() and not source.exists():
                target.replace(source)
        self._moves.clear()

    def _check(self) -> None:
        path = self.path
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path}: is a file; give a folder to write to")
        if path.exists() and path.resolve() == self._source.resolve():
            raise OutputError(f"{path}: is the source itself; give another folder to write to")
        if path.exists() and not self._overwrite:
            present = [item.name for item in path.iterdir() if item.name != STAGING_NAME]
            if present:
                raise OutputError(
                    f"{path}: is not empty ({present[0]}, …); give another folder, or --overwrite "
                    "to replace the checkpoint in it"
                )

    def _make(self, folder: Path) -> None:
        """Make a folder and those above it, and remember which ones."""
        missing = []
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for absent in reversed(missing):
            absent.mkdir()
            self._made.append(absent)

    def _take_lock(self) -> None:
        if self.staging.is_symlink():  # what it leads to is not ours to empty
            raise OutputError(f"{self.staging}: is a link: remove it")
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        self._lock = os.open(self.staging, flags)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            self._lock = -1
            raise OutputError(
                f"{self.path}: another emp-llm is writing there; wait for it or give another folder"
            ) from error

    def _clean_up(self) -> None:
        self._take_back()
        if self._lock >= 0:
            shutil.rmtree(self.staging, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1
        self._remove_made()

    def _remove_made(self) -> None:
        for folder in reversed(self._made):
            with suppress(OSError):  # somebody else's file is in it by now
                folder.rmdir()
        self._made.clear()

    def _explain(self, error: OSError) -> OutputError:
        where = error.filename or self.path
        if error.errno == errno.ENOSPC:
            with suppress(OSError):
                free = shutil.disk_usage(_existing(self.path)).free
                return OutputError(
                    f"{self.path}: the disk is full ({free:,} bytes free now that the unfinished "
                    "files are gone); free some, or give a folder on another disk"
                )
        return OutputError(f"{where}: cannot be written: {error.strerror}; give another folder")


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.absolute().parent)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
