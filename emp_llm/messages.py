"""How text that others chose is shown: in one line, printable, and not too long.

Names of tensors and files may hold line ends, escape sequences that a terminal obeys, and marks
that turn the direction of writing around.
"""

import reprlib
from typing import Final

__all__ = ["MAX_MESSAGE", "first_line", "message_line", "printable", "shortened"]


MAX_MESSAGE: Final = 4_000
"""Characters of the longest message; a path can have 4,096 bytes."""

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 120
_repr.maxlevel = 3


def printable(text: str) -> str:
    r"""Text with an escape in the place of every character that cannot be printed.

    >>> printable("up\x1b[31m_proj")
    'up\\x1b[31m_proj'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def message_line(text: str) -> str:
    """A message as one printable line of at most `MAX_MESSAGE` characters, cut in the middle."""
    return _cut(printable(_cut(text)))


def _cut(text: str) -> str:
    half = MAX_MESSAGE // 2 - 2
    return text if len(text) <= MAX_MESSAGE else f"{text[:half]} … {text[-half:]}"


def shortened(value: object) -> str:
    """The repr of any value of JSON, cut to about a hundred characters."""
    return _repr.repr(value)


def first_line(error: BaseException) -> str:
    """The first line of an error's text; its kind where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
