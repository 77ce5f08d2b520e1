"""A value that the first of several threads to need it computes for all."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar, cast

__all__ = ["Once"]

Value = TypeVar("Value")


class Once(Generic[Value]):
    """A value that is computed once, when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_known = False
        self._value: Value | None = None

    def get(self, compute: Callable[[], Value]) -> Value:
        """The value; computed by the first caller, whichever thread that is."""
        with self._lock:
            if not self._is_known:
                self._value, self._is_known = compute(), True
            return cast("Value", self._value)

    @property
    def value(self) -> Value:
        """The value, once `get` has computed it.

        Raises:
            RuntimeError: If it has not.
        """
        if not self._is_known:
            raise RuntimeError("the value is not known yet")
        return cast("Value", self._value)
