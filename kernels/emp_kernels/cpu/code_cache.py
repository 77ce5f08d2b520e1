"""Compiled kernels are kept on disk apart for each state of the sources.

To decide whether a cached kernel is still valid, numba looks at the file that defines it, not at
the files of the kernels and constants that are compiled into it. After a change of one file, an old
kernel of another file would run on with the old code in it. Here the name of the cache's folder
tells the contents of all sources that can be compiled into a kernel. Code of other sources is never
found, whatever the times are at which files were written.
"""

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from numba.core.caching import CacheImpl, _CacheLocator

__all__ = ["keep_apart"]

_PREFIX = "kernels-"
_KEPT_S = 86400.0
"""Code of other sources that was used within a day may be that of a process that still runs."""


def keep_apart(folder: Path, sources: Sequence[Path]) -> None:
    """Keep the compiled kernels of a folder apart for each state of the sources.

    Their folder is made where numba would put them: in ``__pycache__``, or in the user's cache
    where that cannot be written to. Where neither can, they last as long as the process. Folders of
    other sources that were not used for a day are removed.

    Args:
        folder: Of the files that define kernels.
        sources: All files that the code depends on.
    """
    name = _PREFIX + _digest(sources)
    usual: list[Any] = CacheImpl._locator_classes

    class Locator(_CacheLocator):
        """Where the kernels of one file are kept, see numba's class."""

        def __init__(self, py_func, py_file: str, base: str) -> None:
            self._py_file = py_file  # that numba's warnings name
            self._line = py_func.__code__.co_firstlineno
            self._path = _used_folder(base, name)
            self.ensure_cache_path()

        @classmethod
        def from_function(cls, py_func, py_file: str):
            if Path(py_file).parent != folder:
                return None
            for one in usual:
                found = one.from_function(py_func, py_file)
                if found:
                    with suppress(OSError):
                        return cls(py_func, py_file, found.get_cache_path())
            return cls(py_func, py_file, _temporary_folder().name)

        def get_cache_path(self) -> str:
            return self._path

        def get_source_stamp(self) -> str:
            return name

        def get_disambiguator(self) -> str:
            return str(self._line)

    ours: list[Any] = [Locator]
    CacheImpl._locator_classes = ours + usual


def _digest(sources: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for source in sorted(sources):
        digest.update(hashlib.sha256(source.read_bytes()).digest())
    return digest.hexdigest()[:16]


@cache
def _temporary_folder() -> "tempfile.TemporaryDirectory[str]":
    """A folder that is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="emp-kernels-")


@cache
def _used_folder(base: str, name: str) -> str:
    """The folder of that name, marked as used now; old ones beside it are removed."""
    path = Path(base, name)
    path.mkdir(parents=True, exist_ok=True)
    os.utime(path)
    for other in Path(base).glob(_PREFIX + "*"):
        with suppress(OSError):  # another process may remove it first
            if other.stat().st_mtime < time.time() - _KEPT_S:
                shutil.rmtree(other)
    return str(path)
