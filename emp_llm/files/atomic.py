"""Small files, written atomically: under another name, flushed, renamed."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from emp_llm.errors import OutputError

__all__ = [
    "check_place",
    "flush_path",
    "indented",
    "replacing",
    "unfinished_path",
    "write_json",
    "write_json_durably",
    "write_whole",
]


_NUMBERS = re.compile(r"\[\n\s+((?:[-+.\deE]+,?\s+)+)\]")


def unfinished_path(path: Path) -> Path:
    """Where a file is written before it gets its name: hidden, in the same folder."""
    return path.with_name(f".{path.name}.unfinished")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file in one step, in place of an older one.

    Yields:
        `unfinished_path`, to write to. When the block is left that file gets its name; after an
        error it is removed, and the older file is as it was.

    Raises:
        OSError: If it cannot be flushed or renamed.
    """
    unfinished = unfinished_path(path)
    try:
        yield unfinished
        # the content first: after a crash the new name must not lead to an empty file
        flush_path(unfinished)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json_durably(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file in one step: it is on disk, under its name, when this returns.

    Raises:
        OSError: If it cannot be written; what was there before is there still.
    """
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    flush_path(path.parent)


def flush_path(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk.

    Raises:
        OSError: If that fails.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """Write a JSON file, `indented`.

    Raises:
        OSError: If it cannot be written.
    """
    path.write_text(indented(content) + "\n", encoding="utf-8")


def indented(content: Mapping[str, object]) -> str:
    """JSON for people and programs: indented, a list of numbers on one line."""
    text = json.dumps(content, indent=2, ensure_ascii=False)
    # within strings JSON has no line ends, so what is matched are lists
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file, in the place of an older one.

    Raises:
        OutputError: If it cannot be written; then the older one is as it was.
    """
    try:
        with replacing(path) as unfinished:
            unfinished.write_bytes(data)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written: {error.strerror}; free some space or give another file"
        ) from error


def check_place(path: Path) -> None:
    """Check that a file can be written, before there is anything to write.

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
