"""The command line of emp-llm: ``emp-llm COMMAND …`` or ``python -m emp_cli COMMAND …``."""

import io
import signal
import sys
from types import FrameType

__all__ = ["main"]


def main() -> None:
    """Run the command that the arguments name, and exit with its status."""
    from emp_cli.app import app

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a sign that it does not know ends no command
            stream.reconfigure(errors="replace")
    signal.signal(signal.SIGTERM, _terminate)
    app(prog_name="emp-llm")


def _terminate(number: int, _frame: FrameType | None) -> None:
    """End by way of the ``with`` blocks, so that nothing unfinished is left behind."""
    sys.exit(128 + number)
