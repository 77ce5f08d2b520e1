"""Small files that are there whole or not at all, whatever happens to the machine."""

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from emp_llm.errors import OutputError

__all__ = [
    "check_place",
    "flush_path",
    "replace_file",
    "write_json",
    "write_json_durably",
    "write_whole",
]


_UNFINISHED = ".writing"
_NUMBERS = re.compile(r"\[\n\s+((?:[-+.\deE]+,?\s+)+)\]")


def write_json_durably(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file in one step: it is on disk, under its name, when this returns.

    Raises:
        OSError: If it cannot be written; what was there before is there still.
    """
    unfinished = path.with_name(path.name + _UNFINISHED)
    with unfinished.open("w", encoding="utf-8") as file:
        json.dump(content, file, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    flush_path(path.parent)


def flush_path(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk. OSErrors pass."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file of JSON for people and programs: indented, a list of numbers on one line."""
    path.write_text(_indented(content) + "\n", encoding="utf-8")


def _indented(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    # within strings JSON has no line ends, so what is matched are lists
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)


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
