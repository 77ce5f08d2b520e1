"""The folder that a run writes: whole, or not there.

Everything is written to a hidden folder inside it, on the same file system, and moved up at the
end, the files that make it look like a model last. What a run that broke off had finished stays in
the hidden folder, with a journal of it, until the same command goes on.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from emp_llm.checkpoint.json_files import read_json_object
from emp_llm.checkpoint.small_files import CONFIG_NAME
from emp_llm.checkpoint.weight_files import INDEX_NAME, WEIGHTS_NAME, read_index
from emp_llm.errors import CheckpointError, EmpError, OutputError
from emp_llm.files.atomic import flush_path, write_json_durably
from emp_llm.output.journal import Journal, difference
from emp_llm.report.file_names import FIGURE_NAME, REPORT_NAME

__all__ = ["STAGING_NAME", "OutputFolder"]

STAGING_NAME = ".emp-llm-unfinished"

_REPLACED = ".replaced"
_MOVING = ".moving.json"
_LAST = (REPORT_NAME, INDEX_NAME, CONFIG_NAME)


class OutputFolder:
    """A folder being written, as a context manager.

    Leaving the ``with`` block without `publish`, or with an error, takes away all that was
    written, and the folder too if it was not there before. Only what the journal says is finished
    is kept, if the same command may succeed later. OSErrors that leave the block come out as
    OutputErrors.

    Args:
        path: The folder to make.
        overwrite: Whether to replace a checkpoint that is there, and an unfinished run of another
            kind.
        source: The folder that is read from, which must be another one.
        run: What the run is, as `emp_llm.output.journal.describe_run` tells; None for one that
        cannot be
            gone on with.

    Attributes:
        journal: What is finished of the run; for an earlier one's files it is still to be seen
            whether they are sound.
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

    @property
    def staging(self) -> Path:
        """The hidden folder that files are written to."""
        return self.path / STAGING_NAME

    def __enter__(self) -> "OutputFolder":
        self._check_path()
        try:
            if not self.staging.is_dir():
                self._check_empty()
            self._make(self.staging)
            self._take_lock()
            self._refuse_other_run()
            self._take_back()
            self._check_empty()
            self._clear()
            if self._run is not None:
                self.journal.begin(self._run)
                for folder in (self.staging, self.path, self.path.absolute().parent):
                    flush_path(folder)
        except OSError as error:
            if self._lock >= 0 and not self._finished():
                self._remove_all()
            self._leave()
            raise self._explain(error) from error
        except OutputError:
            self._leave()
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
            # a disk that fails: what is left is cleared by the next run
            with suppress(OSError, OutputError):
                self._take_back()
                self._remove_unfinished(keep=True)
            kept = self._kept()
        if kept:
            self._leave()
        else:
            self._remove_all()
        told = self._explain(error) if isinstance(error, OSError) else error
        if told is not None and kept:
            told.add_note(f"{kept} kept in {self.path}: the same command goes on from there")
        if told is not None and (self.staging / _MOVING).is_file():
            told.add_note(
                f"{self.path} is not as it was before: the next command that writes there puts "
                "back what was there"
            )
        if told is not error and told is not None:
            raise told from error

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """For those who write to the folder that another process made: explain their OSErrors."""
        try:
            yield
        except OSError as error:
            raise self._explain(error) from error

    def publish(self) -> None:
        """Move everything to its place; the checkpoint that is replaced goes first.

        If a move fails, or the machine does, all of them are taken back.

        Raises:
            OutputError: If, without `overwrite`, a file has come meanwhile where one is to go.
        """
        new = [
            path.relative_to(self.staging)
            for path in self.staging.rglob("*")
            if path.is_file() and not self.journal.holds(path)
        ]
        new.sort(key=lambda file: (_LAST.index(str(file)) if str(file) in _LAST else -1, file))
        if not self._overwrite:
            self._check_free(new)
        for file in new:
            flush_path(self.staging / file)
        write_json_durably(self.staging / _MOVING, {"files": [str(file) for file in new]})
        if self._overwrite:
            self._set_aside(new)
        for file in new:
            if str(file) == CONFIG_NAME:  # with it the folder looks like a model
                flush_path(self.path)
            self._move(self.staging / file, self.path / file)
        flush_path(self.path)
        (self.staging / _MOVING).unlink()
        self._made.clear()

    def _check_free(self, new: Iterable[Path]) -> None:
        for file in new:
            if os.path.lexists(self.path / file):
                raise OutputError(
                    f"{self.path}: {file} was not there when this run began: move it away, and run "
                    "the command again"
                )

    def _set_aside(self, new: Iterable[Path]) -> None:
        """Put what belongs to the older checkpoint, or is in the way, where it will be deleted."""
        older = {file for file in new if (self.path / file).is_file()}
        older |= {Path(name) for name in (CONFIG_NAME, REPORT_NAME, FIGURE_NAME)}
        older |= {Path(name) for name in (INDEX_NAME, WEIGHTS_NAME)}
        with suppress(CheckpointError):  # a damaged index names nothing
            older |= {Path(name) for name in read_index(self.path / INDEX_NAME)[0].values()}
        for file in sorted(older, key=lambda file: str(file) != CONFIG_NAME):
            if (self.path / file).is_file():
                self._move(self.path / file, self.staging / _REPLACED / file)

    def _move(self, source: Path, target: Path) -> None:
        for folder in (source.parent, target.parent):
            self._check_inside(folder)
        self._make(target.parent)
        source.replace(target)

    def _check_inside(self, folder: Path) -> None:
        """Refuse a link in the folder that would lead to files elsewhere."""
        if not folder.resolve().is_relative_to(self.path.resolve()):
            raise OutputError(f"{folder}: is a link out of {self.path}: remove it")

    def _take_back(self) -> None:
        """Undo the moves of a `publish` that did not come to its end."""
        try:
            names = read_json_object(self.staging / _MOVING).get("files")
        except CheckpointError:  # it had not begun
            return
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return  # no file of ours
        for name in reversed(names):
            if (self.path / name).is_file() and not (self.staging / name).exists():
                self._move(self.path / name, self.staging / name)
        replaced = self.staging / _REPLACED
        for path in sorted(replaced.rglob("*"), key=lambda path: path.name == CONFIG_NAME):
            if path.is_file():
                self._move(path, self.path / path.relative_to(replaced))
        (self.staging / _MOVING).unlink()

    def _check_path(self) -> None:
        path = self.path
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path}: is a file; give a folder to write to")
        if path.exists() and path.resolve() == self._source.resolve():
            raise OutputError(f"{path}: is the source itself; give another folder to write to")

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
        """Refuse to throw away, or to mix with, what another command has finished."""
        then = self.journal.run()
        if then is None or self._overwrite or not self._finished():
            return
        if self._run is None:
            told = "of prune"
        elif changed := difference(self._run, then):
            told = f"that differs from this one ({changed})"
        else:
            return
        raise OutputError(
            f"{self.path}: holds an unfinished run {told}: repeat the command that began it, or "
            "give --overwrite to discard it"
        )

    def _clear(self) -> None:
        """Leave nothing of earlier runs but what this one goes on with."""
        then = self.journal.run()
        goes_on = then is not None and self._run is not None and not difference(self._run, then)
        self._remove_unfinished(keep=goes_on)

    def _remove_unfinished(self, *, keep: bool) -> None:
        for path in self.staging.iterdir():
            if not (keep and self.journal.keeps(path)):
                _remove(path)

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
        # one that ended between the two has taken the folder away, and a third may have made it
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._lock), self.staging.stat()):
                return
        raise self._written_by_another()

    def _written_by_another(self) -> OutputError:
        self._made.clear()  # all of it is the other's by now
        return OutputError(
            f"{self.path}: another emp-llm is writing there; wait for it or give another folder"
        )

    def _finished(self) -> bool:
        """Whether anything is finished, in the hidden folder or on the way up from it."""
        return bool(self._kept()) or (self.staging / _MOVING).is_file()

    def _kept(self) -> str:
        """What is finished in the hidden folder, in words."""
        files, blocks = len(self.journal.finished()), self.journal.masked_units()
        if files:
            return "1 file is finished and" if files == 1 else f"{files} files are finished and"
        if blocks:
            number = "1 block" if blocks == 1 else f"{blocks} blocks"
            return f"the masks of {number} of the model are"
        return ""

    def _remove_all(self) -> None:
        """Take away all that is not in its place; where that fails, an older checkpoint stays."""
        with suppress(OSError, OutputError):
            self._take_back()
            shutil.rmtree(self.staging, ignore_errors=True)
        self._leave()

    def _leave(self) -> None:
        """Let others write here, and leave no folder that is empty."""
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
    """Whether the same command may succeed after this error: not if the source is at fault."""
    return error.may_pass if isinstance(error, EmpError) else True


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.absolute().parent)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
