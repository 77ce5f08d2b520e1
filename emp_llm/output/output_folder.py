"""The output folder of a run: whole, or not there.

Everything is written to a staging folder, hidden inside it and so on the same file system, and
moved to its place at the end. What a run had finished when it broke off stays in the staging
folder, with a journal of it, until the same command goes on.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from emp_llm.errors import EmpError, OutputError
from emp_llm.files.atomic import flush_path
from emp_llm.output.journal import Journal
from emp_llm.output.overlap import check_apart
from emp_llm.output.publication import Publication
from emp_llm.output.run_description import difference

__all__ = ["STAGING_NAME", "OutputFolder"]

STAGING_NAME = ".emp-llm-unfinished"
"""The staging folder's name."""


class OutputFolder:
    """A folder being written, as a context manager.

    Leaving the ``with`` block without `publish`, or with an error, removes all that was written,
    and the folder too if it was not there before. Only what the journal records as finished is
    kept, if the same command may succeed later. An OSError that leaves the block becomes an
    OutputError.

    Args:
        path: The folder to make.
        overwrite: Whether to replace a checkpoint that is there, and an unfinished run of another
            kind.
        source: The folder that is read from, which must share no file with `path`.
        run: What the run is, see `emp_llm.output.run_description.describe_run`; None for one that
            cannot be resumed.

    Attributes:
        path: The folder.
        journal: What is finished of the run. Whether files of an earlier run are sound is not
            checked here.

    Raises:
        OutputError: On entry, if the folder cannot be written to, is not empty, overlaps the
            source, or holds an unfinished run that differs.
    """

    def __init__(
        self,
        path: Path,
        *,
        overwrite: bool,
        source: Path,
        run: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = path
        self._overwrite = overwrite
        self._source = source
        self._run = run
        self._made: list[Path] = []
        self._lock = -1
        self.journal = Journal(self.staging)
        self._publication = Publication(path, self.staging, self._make)

    @property
    def staging(self) -> Path:
        """The hidden folder that files are written to until they are published."""
        return self.path / STAGING_NAME

    def __enter__(self) -> "OutputFolder":
        self._check_path()
        try:
            if not self.staging.is_dir():
                self._check_empty()
            self._make(self.staging)
            self._take_lock()
            self._refuse_other_run()
            self._publication.take_back()
            self._check_empty()
            self._clear()
            if self._run is not None:
                self.journal.begin(self._run)
                for folder in (self.staging, self.path, self.path.absolute().parent):
                    flush_path(folder)
        except OutputError:
            self._leave()
            raise
        except BaseException as error:
            if self._lock >= 0:
                if not self._finished():
                    self._remove_all()
                self._tell(error, self._kept())
            self._leave()
            if isinstance(error, OSError):
                raise self._explain(error) from error
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        kept = ""
        if self._run is not None and error is not None and _may_pass(error):
            # if the disk fails here too, the next run clears what is left
            with suppress(OSError, OutputError):
                self._publication.take_back()
                self._remove_unfinished(keep=True)
            kept = self._kept()
        if kept:
            self._leave()
        else:
            self._remove_all()
        raised = self._explain(error) if isinstance(error, OSError) else error
        if raised is not None:
            self._tell(raised, kept)
        if raised is not None and self._publication.begun:
            raised.add_note(
                f"{self.path} is not as it was before: the next command that writes there puts "
                "back what was there"
            )
        if raised is not error and raised is not None:
            raise raised from error

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """Explain OSErrors of a process that writes to the folder that another process made."""
        try:
            yield
        except OSError as error:
            raise self._explain(error) from error

    def publish(self) -> None:
        """Move everything to its place; the checkpoint that is replaced goes first.

        If a move fails, or the machine does, all moves are taken back.

        Raises:
            OSError: If a file cannot be moved.
            OutputError: If, without `overwrite`, a file has come meanwhile where one is to go.
        """
        new = [
            path.relative_to(self.staging)
            for path in self.staging.rglob("*")
            if path.is_file() and not self.journal.holds(path)
        ]
        self._publication.publish(new, overwrite=self._overwrite)
        self._made.clear()

    def _check_path(self) -> None:
        path = self.path
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path}: is a file; give a folder to write to")
        check_apart(path, self._source)

    def _check_empty(self) -> None:
        if self._overwrite or not self.path.exists():
            return
        present = [item.name for item in self.path.iterdir() if item.name != STAGING_NAME]
        if present:
            raise OutputError(
                f"{self.path}: is not empty ({present[0]}, …); give another folder, or --overwrite "
                "to replace the checkpoint in it"
            )

    def _refuse_other_run(self) -> None:
        """Refuse to discard, or to mix with, what another command has finished."""
        then = self.journal.run()
        if then is None or self._overwrite or not self._finished():
            return
        if self._run is None:
            kind = "of prune or shrink"
        elif changed := difference(self._run, then):
            kind = f"that differs from this one ({changed})"
        else:
            return
        raise OutputError(
            f"{self.path}: holds an unfinished run {kind}: repeat the command that began it, or "
            "give --overwrite to discard it"
        )

    def _clear(self) -> None:
        """Remove everything of earlier runs that this one does not resume."""
        then = self.journal.run()
        goes_on = then is not None and self._run is not None and not difference(self._run, then)
        self._remove_unfinished(keep=goes_on)

    def _remove_unfinished(self, *, keep: bool) -> None:
        copied = {self.staging / name for name in self.journal.copied()} if keep else set()
        for path in self.staging.iterdir():
            if not (keep and self.journal.keeps(path)):
                _remove_but(copied, path)

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
            raise self._written_by_another() from error
        # between the two calls the process that held the lock may have ended and removed the
        # folder, and a third may have made it again: then what is locked here has no name any more
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._lock), self.staging.stat()):
                return
        raise self._written_by_another()

    def _written_by_another(self) -> OutputError:
        self._made.clear()  # all of it belongs to the other process by now
        return OutputError(
            f"{self.path}: another emp-llm is writing there; wait for it or give another folder"
        )

    def _finished(self) -> bool:
        """Whether anything is finished, in the staging folder or being moved from it."""
        return bool(self._kept()) or self._publication.begun

    def _kept(self) -> str:
        """What is finished in the staging folder, in words; empty for nothing."""
        files = len(self.journal.finished()) + len(self.journal.copied())
        parts = self.journal.masked_units()
        if files:
            return "1 file is finished and" if files == 1 else f"{files} files are finished and"
        if self.journal.trains:
            return "the masks of the model and the state of its training are"
        if self.journal.choices() is not None:
            return "the choice of what stays is"
        if parts:
            of = f"of {parts} part{'s' if parts > 1 else ''} of the model"
            return f"what stays {of} is" if self._shrinks else f"the masks {of} are"
        return "what was measured is" if self.journal.measures else ""

    @property
    def _shrinks(self) -> bool:
        return bool((self._run or {}).get("options", {}).get("command") == "shrink")

    def _tell(self, error: BaseException, kept: str) -> None:
        """Add to an error what is kept, in words; to an interruption, that nothing is, too."""
        if kept:
            error.add_note(f"{kept} kept in {self.path}: the same command goes on from there")
        elif isinstance(error, KeyboardInterrupt):
            error.add_note("no output was kept; run the command again")

    def _remove_all(self) -> None:
        """Remove all that is not published; an older checkpoint is put back first."""
        with suppress(OSError, OutputError):
            self._publication.take_back()
            shutil.rmtree(self.staging, ignore_errors=True)
        self._leave()

    def _leave(self) -> None:
        """Release the lock, and remove folders that this run made and that are empty."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        for folder in reversed(self._made):
            with suppress(OSError):  # something is in it
                folder.rmdir()
        self._made.clear()

    def _explain(self, error: OSError) -> OutputError:
        where = error.filename or self.path
        if error.errno == errno.ENOSPC:
            with suppress(OSError):
                free = shutil.disk_usage(_existing(self.path)).free
                return OutputError(
                    f"{self.path}: the disk is full ({free:,} bytes are free now that the run has "
                    "stopped); free some, or give a folder on another disk"
                )
        return OutputError(f"{where}: cannot be written: {error.strerror}; give another folder")


def _may_pass(error: BaseException) -> bool:
    """Whether the same command may succeed after this error; not if the source is at fault."""
    return error.may_pass if isinstance(error, EmpError) else True


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.absolute().parent)


def _remove_but(kept: Collection[Path], path: Path) -> None:
    """Remove a file or folder, but not these files nor the folders that hold them."""
    if path in kept:
        return
    if not any(file.is_relative_to(path) for file in kept):
        _remove(path)
        return
    for inner in path.iterdir():
        _remove_but(kept, inner)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
