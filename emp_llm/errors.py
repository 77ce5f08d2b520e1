"""The errors that emp-llm foresees: each ends a command as one line and exit status 1.

    EmpError
    ├── OptionError             an option has a value out of its range; a ValueError, too
    ├── CheckpointError         the source cannot be read, or is not what it claims to be
    │   ├── HubError          *     the Hub, or the connection to it, refused
    │   └── SourceReadError   *     the file system failed to read it
    ├── FormatError             packed data is damaged, or of a version that this release lacks
    ├── OutputError           * the result cannot be written
    ├── DeviceError           * a GPU has no room for the work
    └── RankError             * another of the processes that work together failed

    * the same command may succeed later, so what is done is kept (`EmpError.may_pass`)

A message says what is wrong, where, what was found and what to do. Any other exception that escapes
is a bug and keeps its traceback.
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

    Its text is one printable line for the user, even if names of files or tensors in it hold
    control characters.

    Args:
        message: The text.

    Attributes:
        may_pass: Whether the same command may succeed later, so that its work is worth keeping.
    """

    may_pass = False

    def __init__(self, message: str) -> None:
        super().__init__(message_line(message))


class OptionError(EmpError, ValueError):
    """An option's value is out of its range."""


class CheckpointError(EmpError):
    """The source checkpoint cannot be read, or is not what it claims to be."""


class HubError(CheckpointError):
    """The Hub, or the connection to it, refused."""

    may_pass = True


class SourceReadError(CheckpointError):
    """The file system failed to read the source."""

    may_pass = True


class FormatError(EmpError):
    """Packed data is damaged, or of a version that this release does not know."""


class OutputError(EmpError):
    """The result cannot be written."""

    may_pass = True


class DeviceError(EmpError):
    """A GPU has no room for the work."""

    may_pass = True


class RankError(EmpError):
    """Another of the processes that work together failed, or cannot be reached.

    Args:
        message: The text.
        may_pass: Whether the error of the other process is one that may pass.
    """

    def __init__(self, message: str, *, may_pass: bool = True) -> None:
        super().__init__(message)
        self.may_pass = may_pass
