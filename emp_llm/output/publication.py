"""Moves files from the staging folder to their place in one step that can be undone.

A folder of many files cannot be replaced at once. So what is going to be moved is noted first; the
files that the new ones replace are set aside; the files that make a folder look like a model are
moved last. Until the note is removed, every move can be taken back: by this run or, after a crash,
by the next one.
"""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from emp_llm.checkpoint.json_files import read_json_object
from emp_llm.checkpoint.left_behind import CONFIG_NAME, holds_weights
from emp_llm.checkpoint.weight_files import INDEX_NAME, WEIGHTS_NAME, read_index
from emp_llm.errors import CheckpointError, FormatError, OutputError
from emp_llm.files.atomic import flush_path, write_json_durably
from emp_llm.report.file import read_report
from emp_llm.report.file_names import FIGURE_NAME, REPORT_NAME

__all__ = ["Publication"]

_REPLACED = ".replaced"
_MOVING = ".moving.json"
_LAST = (REPORT_NAME, INDEX_NAME, CONFIG_NAME)


class Publication:
    """The moves from a staging folder to the folder that it lies in.

    Args:
        path: The folder that files are moved to.
        staging: The staging folder, on the same file system.
        make_folder: Makes a folder and those above it.
    """

    def __init__(self, path: Path, staging: Path, make_folder: Callable[[Path], None]) -> None:
        self._path = path
        self._staging = staging
        self._make_folder = make_folder

    @property
    def begun(self) -> bool:
        """Whether files are being moved, or were when a run broke off."""
        return (self._staging / _MOVING).is_file()

    def publish(self, new: Iterable[Path], *, overwrite: bool) -> None:
        """Move files to their place; those that they replace are set aside first.

        Args:
            new: The files, relative to the staging folder.
            overwrite: Whether to replace the checkpoint that is there.

        Raises:
            OSError: If a file cannot be moved.
            OutputError: If, without `overwrite`, a file is there already.
        """
        ordered = sorted(new, key=lambda file: (_rank(file), file))
        if not overwrite:
            self._check_free(ordered)
        for file in ordered:
            flush_path(self._staging / file)
        write_json_durably(self._staging / _MOVING, {"files": [str(file) for file in ordered]})
        if overwrite:
            self._set_aside(ordered)
        for file in ordered:
            if str(file) == CONFIG_NAME:  # with it the folder looks like a model
                flush_path(self._path)
            self._move(self._staging / file, self._path / file)
        flush_path(self._path)
        (self._staging / _MOVING).unlink()

    def take_back(self) -> None:
        """Undo the moves of a `publish` that did not finish.

        Raises:
            OSError: If a file cannot be moved.
            OutputError: If a move would lead out of the folder.
        """
        try:
            names = read_json_object(self._staging / _MOVING).get("files")
        except CheckpointError:  # it had not begun
            return
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return  # not a file of ours
        for name in reversed(names):
            if (self._path / name).is_file() and not (self._staging / name).exists():
                self._move(self._path / name, self._staging / name)
        replaced = self._staging / _REPLACED
        for path in sorted(replaced.rglob("*"), key=lambda path: path.name == CONFIG_NAME):
            if path.is_file():
                self._move(path, self._path / path.relative_to(replaced))
        (self._staging / _MOVING).unlink()

    def _check_free(self, new: Iterable[Path]) -> None:
        for file in new:
            if os.path.lexists(self._path / file):
                raise OutputError(
                    f"{self._path}: {file} was not there when this run began: move it away, and "
                    "run the command again"
                )

    def _set_aside(self, new: Iterable[Path]) -> None:
        """Move what belongs to the older checkpoint, or is in the way, where it will be deleted."""
        older = {file for file in new if (self._path / file).is_file()}
        older |= {Path(name) for name in (CONFIG_NAME, REPORT_NAME, FIGURE_NAME)}
        older |= {Path(name) for name in (INDEX_NAME, WEIGHTS_NAME)}
        with suppress(CheckpointError):  # a damaged index names nothing
            older |= {Path(name) for name in read_index(self._path / INDEX_NAME)[0].values()}
        with suppress(CheckpointError, FormatError):  # nor does a damaged report
            older |= self._carried_weights()
        for file in sorted(older, key=lambda file: str(file) != CONFIG_NAME):
            if (self._path / file).is_file():
                self._move(self._path / file, self._staging / _REPLACED / file)

    def _carried_weights(self) -> set[Path]:
        """Weights beside the older model's, which transformers might load with the new one's."""
        report = read_report(self._path)
        return {Path(name) for name in (report["files"] if report else ()) if holds_weights(name)}

    def _move(self, source: Path, target: Path) -> None:
        for folder in (source.parent, target.parent):
            self._check_inside(folder)
        self._make_folder(target.parent)
        source.replace(target)

    def _check_inside(self, folder: Path) -> None:
        """Refuse a link in the folder that would lead to files elsewhere."""
        if not folder.resolve().is_relative_to(self._path.resolve()):
            raise OutputError(f"{folder}: is a link out of {self._path}: remove it")


def _rank(file: Path) -> int:
    """A file's place in the order of moves; the files that make a model of a folder come last."""
    return _LAST.index(str(file)) if str(file) in _LAST else -1
