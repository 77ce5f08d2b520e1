"""Untrusted text made safe to print: one line, printable, not too long.

Names of tensors and files may hold line breaks, escape sequences that a terminal obeys, and marks
that reverse the direction of writing.
"""

import reprlib
from typing import Final

__all__ = ["MAX_MESSAGE", "encodable", "first_line", "message_line", "printable", "shortened"]


MAX_MESSAGE: Final = 4_000
"""Characters of the longest message. A path may have 4,096 bytes, so this cuts only the absurd."""

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 120
_repr.maxlevel = 3


def printable(text: str) -> str:
    r"""The text with an escape in place of each character that cannot be printed.

    >>> printable("up\x1b[31m_proj")
    'up\\x1b[31m_proj'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def encodable(text: str) -> str:
    r"""The text with an escape in place of each byte that is not UTF-8, as names of files may have.

    Python reads such a byte as half a character, which no file in UTF-8 can hold.

    >>> encodable("caf\udce9")
    'caf\\udce9'
    """
    return text.encode(errors="backslashreplace").decode()


def message_line(text: str) -> str:
    """A message as one printable line of at most `MAX_MESSAGE` characters, cut in the middle."""
    # cut before as well: escapes make a text up to ten times as long
    return _cut(printable(_cut(text)))


def _cut(text: str) -> str:
    half = MAX_MESSAGE // 2 - 2
    return text if len(text) <= MAX_MESSAGE else f"{text[:half]} … {text[-half:]}"


def shortened(value: object) -> str:
    """The repr of a value that was read from JSON, cut to about a hundred characters.

    >>> shortened([1, 2, 3, 4, 5, 6, 7, 8])
    '[1, 2, 3, 4, 5, 6, ...]'
    """
    return _repr.repr(value)


def first_line(error: BaseException) -> str:
    r"""The first line of an error's text; the name of its class if it has none.

    A line that ends with a colon says nothing without the next one, which is added.

    >>> first_line(OSError("No route to host\nErrno 113"))
    'No route to host'
    >>> first_line(ValueError("Validation failed:\n    3 heads"))
    'Validation failed: 3 heads'
    >>> first_line(TimeoutError())
    'TimeoutError'
    """
    lines = str(error).strip().splitlines() or [type(error).__name__]
    more = lines[0].endswith(":") and len(lines) > 1
    return f"{lines[0]} {lines[1].strip()}" if more else lines[0]
