"""The standard streams of a command: what happens where one is closed, full or not read.

stdin   closed: like /dev/null
stdout  closed: like /dev/null; full: one line and exit status 1; nobody reads on: exit status 141
stderr  closed, full or not read: what cannot be shown is dropped, and the work goes on
"""

import io
import os
import select
import sys
from typing import Final, TextIO, cast

from emp_llm.errors import OutputError

__all__ = ["READER_GONE", "open_streams"]

READER_GONE: Final = 141
"""Exit status where the reader of stdout has ended, as of a process that SIGPIPE kills."""


def open_streams() -> None:
    """Make the standard streams of this process such that a command can rely on them."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # It takes the lowest number that is free. Otherwise a file of ours would get this
            # number, and in it what other code prints.
            os.open(os.devnull, os.O_RDWR)
    # tests put streams of their own in the place of these
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(_Stdout(1, "w", closefd=False), sys.__stdout__)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(_Stderr(2, "w", closefd=False), sys.__stderr__, by_line=True)


class _Stdout(io.FileIO):
    """Stdout, which fails once: what is written afterwards, such as at exit, is dropped."""

    _failed = False

    def write(self, data: object, /) -> int:
        view = cast("memoryview", data)  # BufferedWriter gives no other
        if self._failed:
            return view.nbytes
        try:
            written: int | None = super().write(view)
            while written is None:  # the pipe is set not to wait, and its reader is slow
                select.select([], [self], [])
                written = super().write(view)
        except BrokenPipeError:
            self._failed = True
            sys.exit(READER_GONE)
        except OSError as error:
            self._failed = True
            raise OutputError(
                f"stdout cannot be written: {error.strerror}: direct it elsewhere; files that the "
                "command has written are whole"
            ) from error
        return written


class _Stderr(io.FileIO):
    """Stderr, which does not fail: a run must not end because its progress cannot be shown."""

    def write(self, data: object, /) -> int:
        view = cast("memoryview", data)
        try:
            written: int | None = super().write(view)  # None where it would have to wait
        except OSError:
            written = None
        return view.nbytes if written is None else written


def _text(raw: io.FileIO, before: TextIO | None, *, by_line: bool = False) -> TextIO:
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding="utf-8" if before is None else before.encoding,
        errors="replace",  # a command must not fail for a character that the encoding lacks
        line_buffering=by_line or raw.isatty(),
    )
