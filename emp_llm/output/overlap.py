"""Refuses an output folder that overlaps the source.

A folder inside the source would be one of its files from then on: the next run would copy it. Files
of the source that lie in the output folder could be replaced.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from emp_llm.errors import OutputError

__all__ = ["check_apart"]


def check_apart(out: Path, source: Path) -> None:
    """Check that an output folder and the source share no files, whatever links lead to them.

    Args:
        out: The folder to write to, which need not exist.
        source: The folder that is read.

    Raises:
        OutputError: If one is the other or lies inside it, or a file of the source is a link to one
            in `out`.
    """
    elsewhere = "give another folder to write to"
    if _is_same(out, source):
        raise OutputError(f"{out}: is the source itself; {elsewhere}")
    if any(_is_same(parent, source) for parent in _real(out).parents):
        raise OutputError(
            f"{out}: lies inside the source ({source}), and would be one of its files from then "
            f"on; {elsewhere}"
        )
    if not out.is_dir():
        return
    for file in (source, *_links(source)):
        if any(_is_same(parent, out) for parent in _real(file).parents):
            raise OutputError(f"{out}: holds the source ({file}), which is kept; {elsewhere}")


def _links(folder: Path) -> Iterator[Path]:
    """The files of a folder that are links, as in the Hub's cache."""
    for parent, _, names in os.walk(folder):
        yield from (path for name in names if (path := Path(parent) / name).is_symlink())


def _real(path: Path) -> Path:
    """The path without links, also where its end does not exist."""
    return Path(os.path.realpath(path))


def _is_same(one: Path, other: Path) -> bool:
    # not by name: a file system may ignore case, or be mounted at two places
    with suppress(OSError):
        return one.samefile(other)
    return False
