"""The tree of errors that end a command as one line and exit status 1.

    EmpError
    ├── OptionError       an option's value is out of its range
    ├── CheckpointError   the source cannot be read, or is not what it claims to be
    │   └── HubError      the Hub, or the way to it, refused
    ├── FormatError       packed data is damaged, or of a version this release does not know
    └── OutputError       the result cannot be written

Every message says what, where, what was found and what to do. Anything else that escapes is a bug
and keeps its traceback.
"""

from emp_llm.shown import message_line

__all__ = ["CheckpointError", "EmpError", "FormatError", "HubError", "OptionError", "OutputError"]


class EmpError(Exception):
    """Base of all errors that emp-llm foresees.

    Its text is one printable line, meant for the user, whatever names are in it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message_line(message))


class OptionError(EmpError, ValueError):
    """An option's value is out of its range."""


class CheckpointError(EmpError):
    """The source checkpoint cannot be read, or is not what it claims to be."""


class HubError(CheckpointError):
    """The Hub, or the way to it, refused."""


class FormatError(EmpError):
    """Packed data is damaged, or of a version this release does not know."""


class OutputError(EmpError):
    """The result cannot be written."""
