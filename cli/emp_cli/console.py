"""What every command does with the terminal: progress, errors, exit status, JSON.

Progress and errors go to stderr, results to stdout.
"""

import codecs
import functools
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ParamSpec

import typer

from emp_llm.errors import EmpError
from emp_llm.runtime.memory import peak_bytes
from emp_llm.runtime.progress import Progress, Silent

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

__all__ = [
    "INTERRUPTED",
    "Clock",
    "command",
    "leads_team",
    "print_json",
    "show_error",
    "shown_progress",
]

P = ParamSpec("P")

INTERRUPTED = 130
"""Exit status after Ctrl-C."""

_LINE_SECONDS = 5.0


def command(function: Callable[P, None]) -> Callable[P, None]:
    """Show errors of ours as one line, with exit status 1; others keep their traceback."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            function(*args, **kwargs)
        except EmpError as error:
            show_error(error)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as interruption:
            notes = _notes(interruption) or ["run the command again"]
            typer.echo(f"interrupted: {'; '.join(notes)}", err=True)
            raise typer.Exit(INTERRUPTED) from interruption

    return run


def show_error(error: EmpError) -> None:
    """Print an error of ours as one line."""
    typer.echo("; ".join((f"{type(error).__name__}: {error}", *_notes(error))), err=True)


def _notes(error: BaseException) -> list[str]:
    """Notes that were added to an error, such as that finished work is kept."""
    return getattr(error, "__notes__", [])


def print_json(content: Mapping[str, Any]) -> None:
    """Print the one JSON object that stdout gets."""
    # what an encoding lacks is replaced in text, but JSON has escapes for all characters
    utf8 = codecs.lookup(sys.stdout.encoding or "utf-8").name == "utf-8"
    text = json.dumps(content, indent=2, ensure_ascii=not utf8)
    typer.echo("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))


class Clock:
    """Measures the time and the memory that a command takes."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the clock was created."""
        return time.perf_counter() - self._start

    @property
    def peak_bytes(self) -> int:
        """The largest resident memory of this process, or of one that it started, in bytes.

        Deciding what is pruned runs in a process that ends before pruning begins.
        """
        return max(peak_bytes(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)

    def to_dict(self) -> dict[str, float]:
        """Both, for JSON."""
        return {"seconds": round(self.seconds, 3), "peak_memory_bytes": self.peak_bytes}


def leads_team() -> bool:
    """Whether this process is the first, or the only one, of those that a launcher started."""
    from emp_llm.runtime.launcher import meeting_of

    meeting = meeting_of(os.environ)
    return meeting is None or meeting.rank == 0


@contextmanager
def shown_progress(shown: bool = True) -> Iterator[Progress]:
    """Progress on stderr: a bar on a terminal, a plain line now and then elsewhere."""
    if not shown:
        yield Silent()
        return
    if not sys.stderr.isatty():
        yield _Lines()
        return
    bar = _Bar()
    try:
        yield bar
    finally:
        bar.stop()


class _Bar:
    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True)
        # shown until the amount of work is known
        self._status = self._console.status("reading the structure of the model")
        self._status.start()
        self._progress: RichProgress | None = None

    def begin(self, stage: str, total: int, unit: str = "B") -> None:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as RichProgress

        self.stop()
        amounts = (
            (DownloadColumn(), TransferSpeedColumn())
            if unit == "B"
            else (MofNCompleteColumn(), TextColumn(unit))
        )
        self._progress = RichProgress(
            TextColumn("{task.description:>11}"),
            BarColumn(bar_width=None),
            *amounts,
            TimeRemainingColumn(compact=True),
            console=self._console,
            transient=True,
        )
        self._task = self._progress.add_task(stage, total=total)
        self._progress.start()

    def advance(self, count: int) -> None:
        if self._progress is not None:
            self._progress.advance(self._task, count)

    def stop(self) -> None:
        self._status.stop()
        if self._progress is not None:
            self._progress.stop()


class _Lines:
    def __init__(self) -> None:
        self._stage, self._total, self._done, self._unit = "", 0, 0, "B"
        self._began = self._reported = 0.0

    def begin(self, stage: str, total: int, unit: str = "B") -> None:
        self._stage, self._total, self._done, self._unit = stage, total, 0, unit
        self._began = self._reported = time.monotonic()
        typer.echo(f"{stage} {self._amount(total)}", err=True)

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._reported < _LINE_SECONDS or not self._done:
            return
        self._reported = now
        rate = self._done / (now - self._began)
        left = max(self._total - self._done, 0) / rate
        # A decoder block takes seconds or minutes, and a rate below 1/s would show as 0.
        speed = f"{self._amount(int(rate))}/s, " if rate >= 1 else ""
        typer.echo(
            f"{self._stage}: {self._done / max(self._total, 1):.0%} of "
            f"{self._amount(self._total)}, {speed}{left:.0f} s left",
            err=True,
        )

    def _amount(self, number: int) -> str:
        from emp_cli.tables import count, size

        return size(number) if self._unit == "B" else f"{count(number)} {self._unit}"
