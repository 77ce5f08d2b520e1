"""Criteria by name: built-in ones, registered ones, and any class given as module:Class."""

from __future__ import annotations

import sys
from collections.abc import Set
from importlib import import_module
from inspect import isabstract
from pathlib import Path
from typing import get_args

from emp_llm.calibration.criteria import Criterion, Magnitude, Obs, Random, Ria, Taylor, Wanda
from emp_llm.calibration.statistics import Need
from emp_llm.errors import OptionError
from emp_llm.messages import first_line

__all__ = ["find_criterion", "register_criterion"]


_registered: dict[str, type[Criterion]] = {
    one.name: one for one in (Magnitude, Wanda, Ria, Taylor, Obs, Random)
}


def register_criterion(criterion: type[Criterion]) -> type[Criterion]:
    """Register a criterion by its name; may be used as a decorator of its class.

    Args:
        criterion: A subclass of `Criterion` that can be made without arguments.

    Returns:
        The same class.

    Raises:
        OptionError: If it is not such a class, or another one has that name.
    """
    _check_class(criterion, getattr(criterion, "__name__", repr(criterion)))
    other = _registered.setdefault(criterion.name, criterion)
    if other is not criterion:
        raise OptionError(
            f"criterion {criterion.name!r} is {other.__module__}.{other.__qualname__} already: "
            "choose another name"
        )
    return criterion


def find_criterion(criterion: str | Criterion | type[Criterion]) -> Criterion:
    """Find a criterion.

    Args:
        criterion: A registered name; ``module:Class``, where modules of the current directory can
            be imported as well; or a criterion or its class itself.

    Raises:
        OptionError: If there is no criterion of that name, its module cannot be imported, or it is
            no subclass of `Criterion`.
    """
    if isinstance(criterion, Criterion):
        return _checked(criterion)
    if not isinstance(criterion, str):
        return _made(criterion, repr(criterion))
    if criterion in _registered:
        return _made(_registered[criterion], criterion)
    module, colon, name = criterion.partition(":")
    if not (colon and module and name):
        raise OptionError(
            f"criterion is {criterion!r}; choose one of {', '.join(_registered)}, or give your "
            "own as module:Class"
        )
    return _imported(criterion, module, name)


def _imported(shown: str, module: str, name: str) -> Criterion:
    # as `python -m` does, but `emp-llm` is installed as a script, whose own folder comes first
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        home = import_module(module)
    except Exception as error:  # anything that a user's module raises
        raise OptionError(
            f"criterion {shown!r}: {module} cannot be imported: {type(error).__name__}: {error}"
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
            f"criterion {shown!r}: {module} ({getattr(home, '__file__', 'built in')}) has no "
            f"{name}: name a class of it"
        ) from error
    return _checked(value) if isinstance(value, Criterion) else _made(value, shown)


def _made(criterion: object, shown: str) -> Criterion:
    checked = _check_class(criterion, shown)
    try:
        return checked()
    except Exception as error:  # anything that a user's criterion raises
        raise OptionError(
            f"criterion {shown!r} cannot be made without arguments ({type(error).__name__}: "
            f"{first_line(error)}): give its defaults, or name an object that is made already"
        ) from error


def _check_class(criterion: object, shown: str) -> type[Criterion]:
    if not (isinstance(criterion, type) and issubclass(criterion, Criterion)):
        kind = "class" if isinstance(criterion, type) else type(criterion).__name__
        raise OptionError(
            f"criterion {shown!r} is a {kind}, not a subclass of emp_llm.Criterion: derive "
            "one with scores(weight_RC, statistics)"
        )
    if isabstract(criterion):
        raise OptionError(
            f"criterion {shown!r} has no method scores(weight_RC, statistics): define it"
        )
    if not isinstance(criterion.needs, Set):
        raise OptionError(
            f"criterion {shown!r}: needs is {criterion.needs!r}; make it a frozenset, such as "
            "frozenset({'norms'})"
        )
    unknown = sorted(map(str, set(criterion.needs) - set(get_args(Need))))
    if unknown:
        raise OptionError(
            f"criterion {shown!r} needs {', '.join(unknown)}; calibration gathers "
            f"{', '.join(get_args(Need))}"
        )
    if "gradient" in criterion.needs and len(criterion.needs) > 1:
        raise OptionError(
            f"criterion {shown!r} needs {', '.join(sorted(criterion.needs))}; gradients are "
            "computed in a pass of their own: need the gradient alone, or no gradient"
        )
    return criterion


def _checked(criterion: Criterion) -> Criterion:
    _check_class(type(criterion), type(criterion).__name__)
    return criterion
