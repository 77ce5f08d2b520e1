"""Wrong usage in one short message: what is wrong, what may have been meant, where help is."""

import difflib
import re
import shlex
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, Final

import typer

from emp_cli.app import app
from emp_cli.console import show_error
from emp_llm.errors import EmpError
from emp_llm.messages import printable

__all__ = ["run"]

_PROGRAM: Final = "emp-llm"
_WRONG_USAGE: Final = 2
_COLUMNS: Final = 80
_CLOSE: Final = 0.7
"""How alike a word and a suggestion are, at least; all options have their dashes in common."""

_EXAMPLES: Final = {
    "model": "meta-llama/Llama-2-7b-hf",
    "prompt": "The sky is",
    "folder": "./sparse",
    "repo": "USER/NAME",
    "a": "./sparse",
    "b": "./dense",
    "--out": "./sparse",
    "--perplexity": "wikitext2",
    "--calibration": "wikitext2",
    "--device": "cuda",
    "--beta": "1.0",
}
"""What an argument or option could be, to complete a command by."""

_FEWER: Final = ("--blocks", "--experts", "--neurons", "--kv-heads")
"""One of these shrink needs."""

# Typer exports this one of its usage errors, and not their base class.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def run(arguments: Sequence[str]) -> int:
    """Run the command that the arguments name.

    Args:
        arguments: Arguments of the command line, without the program's name.

    Returns:
        The exit status; 2 for wrong usage, of which stderr says what it is, and 1 where stdout
        cannot be written.
    """
    try:
        status: int | None = app(list(arguments), prog_name=_PROGRAM, standalone_mode=False)
        sys.stdout.flush()
    except EmpError as error:
        show_error(error)
        return 1
    except typer.Abort:
        return 1
    except _UsageError as error:
        if type(error).__name__ != "NoArgsIsHelpError":  # Typer has printed the help then
            print(_message(error, arguments), file=sys.stderr)
        return _WRONG_USAGE
    return status or 0


def _message(caught: Exception, arguments: Sequence[str]) -> str:
    """A line that says what is wrong, and one with a command that helps."""
    error: Any = caught  # its attributes are those of classes that Typer does not export
    command = _command_path(arguments)
    help_line = f"Run '{command} --help' for its options."
    completed = None
    match type(error).__name__:
        case "NoSuchOption":
            option, known = error.option_name, error.possibilities or ()
            said = f"No such option {option!r}.{_suggestion(option, known)}"
        case "MissingParameter":
            said, completed = error.format_message(), _completed(error.ctx, arguments)
        case "BadOptionUsage" if arguments[-1] == error.option_name:
            said, completed = error.format_message(), _with_value(arguments)
        case _:
            said = _with_nearest_choice(error.format_message())
    lines = textwrap.wrap(printable(f"Error: {said}"), _COLUMNS, break_on_hyphens=False)
    lines.append(help_line if completed is None else f"For example: {printable(completed)}")
    return "\n".join(lines)


def _command_path(arguments: Sequence[str]) -> str:
    names = [
        command.name or getattr(command.callback, "__name__", "")
        for command in app.registered_commands
    ]
    return f"{_PROGRAM} {arguments[0]}" if arguments[0] in names else _PROGRAM


def _suggestion(given: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(given, known, n=1, cutoff=_CLOSE)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def _with_nearest_choice(message: str) -> str:
    """Add the choice that a value comes close to, where the message says what it can be."""
    message = message.replace("Value error, ", "")  # of the library that Typer checks values with
    found = re.search(r"'([^']*)' is not one of ('.*')\.$", message)
    if found is None:
        return message
    return message + _suggestion(found[1], re.findall("'(.*?)'", found[2]))


def _completed(context: typer.Context, arguments: Sequence[str]) -> str | None:
    """The command with a value for everything that it lacks; None where there is no example."""
    parts = list(arguments)
    if parts[0] == "shrink" and not any(part.partition("=")[0] in _FEWER for part in parts):
        return None
    for parameter in context.command.params:
        if parameter.required and context.params.get(parameter.name) is None:
            name = parameter.opts[0]
            if name not in _EXAMPLES:
                return None
            parts += [name, _EXAMPLES[name]] if name.startswith("-") else [_EXAMPLES[name]]
    return shlex.join([_PROGRAM, *parts])


def _with_value(arguments: Sequence[str]) -> str | None:
    """The command whose last option lacks its value, with one."""
    example = _EXAMPLES.get(arguments[-1])
    return None if example is None else shlex.join([_PROGRAM, *arguments, example])
