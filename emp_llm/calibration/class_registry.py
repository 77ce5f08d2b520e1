"""Classes that users can add to: built-in ones by name, and any other one as module:Class."""

from __future__ import annotations

import sys
from collections.abc import Set
from importlib import import_module
from inspect import isabstract
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar, cast

from emp_llm.errors import OptionError
from emp_llm.messages import first_line

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["ClassRegistry"]


class _Named(Protocol):
    name: ClassVar[str]
    needs: ClassVar[Any]


_Made = TypeVar("_Made", bound="_Named")


class ClassRegistry(Generic[_Made]):
    """Classes of one kind by name.

    Args:
        what: What they are, for errors.
        base: The class that all of them are derived from.
        method: The method that each has to define, with its arguments, for errors.
        needs: What each may need that calibration gathers.
        built_in: Those that are registered from the start.
    """

    def __init__(
        self,
        what: str,
        base: type,
        method: str,
        needs: Iterable[str],
        built_in: Iterable[type[_Made]],
    ) -> None:
        self._what = what
        self._base = base
        self._method = method
        self._needs = tuple(needs)
        self._registered = {one.name: one for one in built_in}

    def register(self, one: type[_Made]) -> type[_Made]:
        """Register a class by its name.

        Raises:
            OptionError: If it is not such a class, or another one has that name.
        """
        self._check(one, getattr(one, "__name__", repr(one)))
        other = self._registered.setdefault(one.name, one)
        if other is not one:
            raise OptionError(
                f"{self._what} {one.name!r} is {other.__module__}.{other.__qualname__} already: "
                "choose another name"
            )
        return one

    def find(self, given: str | _Made | type[_Made]) -> _Made:
        """Find one by its name, or as module:Class, or as it is, or make one of its class.

        Raises:
            OptionError: If there is none of that name, its module cannot be imported, or it is no
                such class.
        """
        if not isinstance(given, str):
            return self._made(given, repr(given))
        if given in self._registered:
            return self._made(self._registered[given], given)
        module, colon, name = given.partition(":")
        if not (colon and module and name):
            raise OptionError(
                f"{self._what} is {given!r}; choose one of {', '.join(self._registered)}, or give "
                "your own as module:Class"
            )
        return self._made(self._imported(given, module, name), given)

    def _imported(self, shown: str, module: str, name: str) -> object:
        # as `python -m` does, but `emp-llm` is installed as a script, whose own folder comes first
        here = str(Path.cwd())
        sys.path.insert(0, here)
        try:
            home = import_module(module)
        except Exception as error:  # anything that a user's module raises
            raise OptionError(
                f"{self._what} {shown!r}: {module} cannot be imported: {type(error).__name__}: "
                f"{error}"
            ) from error
        finally:
            sys.path.remove(here)
        if here not in sys.path:
            # behind everything that is installed: the module may import others later
            sys.path.append(here)
        try:
            value: object = home
            for part in name.split("."):
                value = getattr(value, part)
        except AttributeError as error:
            raise OptionError(
                f"{self._what} {shown!r}: {module} ({getattr(home, '__file__', 'built in')}) has "
                f"no {name}: name a class of it"
            ) from error
        return value

    def _made(self, given: object, shown: str) -> _Made:
        if isinstance(given, self._base):
            self._check(type(given), type(given).__name__)
            return cast("_Made", given)
        checked = self._check(given, shown)
        try:
            return checked()
        except Exception as error:  # anything that a user's class raises
            raise OptionError(
                f"{self._what} {shown!r} cannot be made without arguments "
                f"({type(error).__name__}: {first_line(error)}): give its defaults, or name an "
                "object that is made already"
            ) from error

    def _check(self, given: object, shown: str) -> type[_Made]:
        if not (isinstance(given, type) and issubclass(given, self._base)):
            kind = "class" if isinstance(given, type) else type(given).__name__
            raise OptionError(
                f"{self._what} {shown!r} is a {kind}, not a subclass of emp_llm."
                f"{self._base.__name__}: derive one with {self._method}"
            )
        if isabstract(given):
            raise OptionError(f"{self._what} {shown!r} has no method {self._method}: define it")
        checked = cast("type[_Made]", given)
        if not isinstance(checked.needs, Set):
            raise OptionError(
                f"{self._what} {shown!r}: needs is {checked.needs!r}; make it a frozenset, such as "
                f"frozenset({{{self._needs[0]!r}}})"
            )
        unknown = sorted(map(str, set(checked.needs) - set(self._needs)))
        if unknown:
            raise OptionError(
                f"{self._what} {shown!r} needs {', '.join(unknown)}; calibration gathers "
                f"{', '.join(self._needs)}"
            )
        return checked
