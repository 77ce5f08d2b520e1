"""The tree of errors that end a command as one line and exit status 1.

    EmpError
    ├── OptionError       an option's value is out of its range
    ├── CheckpointError   the source cannot be read, or is not what it claims to be
    │   ├── HubError          the Hub, or the way to it, refused
    │   └── SourceReadError   the file system failed to read it
    ├── FormatError       packed data is damaged, or of a version this release does not know
    ├── OutputError       the result cannot be written
    ├── DeviceError       a GPU has no room for the work
    └── RankError         another of the processes that work together failed

Every message says what, where, what was found and what to do. Anything else that escapes is a bug
and keeps its traceback.
"""

from emp_llm.messages import message_line

__all__ = [
    "CheckpointError",
    "DeviceError",
    "EmpError",
    "FormatError",
    "HubError",
    "OptionError",
    "OutputError",
    "RankError",
    "SourceReadError",
]


class EmpError(Exception):
    """Base of all errors that emp-llm foresees.

    Its text is one printable line, meant for the user, whatever names are in it.

    Attributes:
        may_pass: Whether the same command may succeed later, so that work is worth keeping.
    """

    may_pass = False

    def __init__(self, message: str) -> None:
        super().__init__(message_line(message))


class OptionError(EmpError, ValueError):
    """An option's value is out of its range."""


class CheckpointError(EmpError):
    """The source checkpoint cannot be read, or is not what it claims to be."""


class HubError(CheckpointError):
    """The Hub, or the way to it, refused."""

    may_pass = True


class SourceReadError(CheckpointError):
    """The file system failed to read the source."""

    may_pass = True


class FormatError(EmpError):
    """Packed data is damaged, or of a version this release does not know."""


class OutputError(EmpError):
    """The result cannot be written."""

    may_pass = True


class DeviceError(EmpError):
    """A GPU has no room for the work."""

    may_pass = True


class RankError(EmpError):
    """Another of the processes that work together failed, or cannot be reached.

    Args:
        message: The line.
        may_pass: Whether the error of the other is one that may pass.
    """

    def __init__(self, message: str, *, may_pass: bool = True) -> None:
        super().__init__(message)
        self.may_pass = may_pass
