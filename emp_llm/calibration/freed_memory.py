"""Returns freed memory to the operating system.

The C library keeps memory that was freed, to use it again. Weights and statistics come in many
sizes, so what it keeps in gaps between others would add up to several decoder blocks.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["give_back"]


def give_back() -> None:
    """Return freed memory of the CPU; does nothing where the C library has no `malloc_trim`."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Callable[[int], int] | None:
    trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim
