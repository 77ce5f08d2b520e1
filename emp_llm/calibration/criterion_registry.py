"""Criteria by name: built-in ones, registered ones, and any class given as module:Class."""

from __future__ import annotations

from typing import get_args

from emp_llm.calibration.class_registry import ClassRegistry
from emp_llm.calibration.criteria import Criterion, Magnitude, Obs, Random, Ria, Taylor, Wanda
from emp_llm.calibration.statistics import Need
from emp_llm.errors import OptionError

__all__ = ["find_criterion", "register_criterion"]


_criteria = ClassRegistry[Criterion](
    "criterion",
    Criterion,
    "scores(weight_RC, statistics)",
    get_args(Need),
    (Magnitude, Wanda, Ria, Taylor, Obs, Random),
)


def register_criterion(criterion: type[Criterion]) -> type[Criterion]:
    """Register a criterion by its name; may be used as a decorator of its class.

    Args:
        criterion: A subclass of `Criterion` that can be made without arguments.

    Returns:
        The same class.

    Raises:
        OptionError: If it is not such a class, or another one has that name.
    """
    return _criteria.register(criterion)


def find_criterion(criterion: str | Criterion | type[Criterion]) -> Criterion:
    """Find a criterion.

    Args:
        criterion: A registered name; ``module:Class``, where modules of the current directory can
            be imported as well; or a criterion or its class itself.

    Raises:
        OptionError: If there is no criterion of that name, its module cannot be imported, or it is
            no subclass of `Criterion`.
    """
    found = _criteria.find(criterion)
    needs = found.needs
    if "gradient" in needs and len(needs) > 1:
        shown = criterion if isinstance(criterion, str) else type(found).__name__
        raise OptionError(
            f"criterion {shown!r} needs {', '.join(sorted(needs))}; gradients are computed in a "
            "pass of their own: need the gradient alone, or no gradient"
        )
    return found
