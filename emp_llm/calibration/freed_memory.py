"""Memory that was freed, given back to the system.

The C library keeps what it has freed for later. Weights and statistics come in all sizes, so that
what is kept, in pieces between others, would come to several blocks of the model.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

__all__ = ["give_back"]


def give_back() -> None:
    """Give freed memory of the CPU back; does nothing where the C library has no such call."""
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any:  # noqa: ANN401 (a function of the C library)
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
