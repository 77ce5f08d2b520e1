"""A file that is whole at any time: written beside the older one and put in its place."""

import os
from collections.abc import Callable
from pathlib import Path

from emp_llm.errors import OutputError

__all__ = ["replace_file", "write_whole"]


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
