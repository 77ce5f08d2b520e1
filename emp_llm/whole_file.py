"""A file that is whole at any time: written beside the older one and put in its place."""

import os
from collections.abc import Callable
from pathlib import Path

from emp_llm.errors import OutputError

__all__ = ["check_place", "replace_file", "write_whole"]


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, in the place of an older one.

    Raises:
        OutputError: If it cannot be written; then the older one is as it was.
    """
    try:
        replace_file(path, lambda new: new.write_bytes(data))
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror}; free some space or give another file"
        ) from error


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file written beside the older one and put it in its place."""
    new = path.with_name(f".{path.name}.unfinished")
    try:
        write(new)
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def check_place(path: Path) -> None:
    """See that a file can be written, before there is anything to write.

    Raises:
        OutputError: If there is no folder to write it to, or it cannot be written to.
    """
    folder = path.absolute().parent
    if not folder.is_dir():
        raise OutputError(f"{path}: there is no such folder; make it first")
    if path.is_dir():
        raise OutputError(f"{path}: is a folder; give the name of a file in it")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{path}: its folder cannot be written to; give another one")
