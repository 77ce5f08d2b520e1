"""Criteria of experts by name: built-in ones, registered ones, and any class as module:Class."""

from __future__ import annotations

from typing import get_args

from emp_llm.calibration.class_registry import ClassRegistry
from emp_llm.shrinking.expert_criteria import (
    Aimer,
    ExpertCriterion,
    ExpertNeed,
    Norm,
    Random,
    Reap,
)

__all__ = ["find_expert_criterion", "register_expert_criterion"]

_criteria = ClassRegistry[ExpertCriterion](
    "score",
    ExpertCriterion,
    "scores(experts)",
    get_args(ExpertNeed),
    (Aimer, Reap, Norm, Random),
)


def register_expert_criterion(criterion: type[ExpertCriterion]) -> type[ExpertCriterion]:
    """Register a criterion of experts by its name; may be used as a decorator of its class.

    Args:
        criterion: A subclass of `ExpertCriterion` that can be made without arguments.

    Returns:
        The same class.

    Raises:
        OptionError: If it is not such a class, or another one has that name.
    """
    return _criteria.register(criterion)


def find_expert_criterion(
    criterion: str | ExpertCriterion | type[ExpertCriterion],
) -> ExpertCriterion:
    """Find a criterion of experts, as `emp_llm.calibration.criterion_registry.find_criterion` does.

    Raises:
        OptionError: If there is none of that name, its module cannot be imported, or it is no
            subclass of `ExpertCriterion`.
    """
    return _criteria.find(criterion)
