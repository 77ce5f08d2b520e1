"""A module of ours in a process of its own, which is asked one question: what starting it takes."""

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import IO, Any

__all__ = ["ask", "module_environment"]


def module_environment() -> dict[str, str]:
    """The environment in which ``python -P -m`` imports what this process would.

    Nothing of the current folder is imported.
    """
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def ask(stdin: IO[bytes] | None, question: Mapping[str, Any]) -> None:
    """Send a question as JSON to a process that was started, and close the pipe.

    Args:
        stdin: The pipe to it.
        question: What JSON can hold.
    """
    if stdin is not None:
        with suppress(BrokenPipeError), stdin as pipe:  # else it has ended, and says why
            pipe.write(json.dumps(question).encode())
