"""The walk that gathers what experts give: one decoder block in memory at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emp_llm.calibration.tensor_loading import unchanged
from emp_llm.errors import CheckpointError
from emp_llm.shrinking.routed_outputs import RoutedOutputs, observing_experts

if TYPE_CHECKING:
    from torch import nn

    from emp_llm.calibration.session import Session
    from emp_llm.shrinking.plan import ShrinkPlan

__all__ = ["outputs_by_holder", "routed_outputs"]

_NAME = "experts"
"""What models of transformers call the module of all experts, whatever class it is of."""


def routed_outputs(session: Session, experts: int) -> dict[str, RoutedOutputs]:
    """What the experts of each decoder block give for the samples, in the dense model.

    Args:
        session: The model and its samples.
        experts: How many experts each of these blocks has.

    Returns:
        By the name of the decoder block in the model; blocks without experts are left out.

    Raises:
        CheckpointError: If the model does not run, or its experts cannot be observed.
    """
    model = session.model
    names = {unit: _experts_in(model.module(unit)) for unit in model.units}
    found = {unit: RoutedOutputs(experts) for unit, name in names.items() if name is not None}
    session.begin("observing experts")
    with session.walk() as walk:
        for unit, calls in session.stops(walk):
            name = names[unit]
            if name is None:
                session.pass_on(walk, unit, calls, unchanged)
                continue
            with observing_experts(model.module(unit), name, found[unit]):
                session.pass_on(walk, unit, calls, unchanged)
    for unit, sums in found.items():
        if not sums.tokens_E.any():
            raise CheckpointError(
                f"{unit}.{names[unit]}: no outputs of experts are seen while "
                f"{type(model.model).__name__} runs: choose a score that needs no data, such as "
                "aimer"
            )
    return found


def outputs_by_holder(plan: ShrinkPlan, session: Session) -> dict[str, RoutedOutputs]:
    """The same by the names of the decoder blocks in the checkpoint.

    Args:
        plan: The checkpoint, with its experts found.
        session: Its model and the samples.

    Raises:
        CheckpointError: As `routed_outputs` does.
    """
    by_block = routed_outputs(session, plan.structures["experts"].number)
    landings = session.model.map.landings
    return {
        axis.holder: by_block[block]
        for name in plan.found.matrices
        for axis in plan.found.axes.get(name, ())
        if axis.kind == "experts" and (block := landings[name].place.block) is not None
    }


def _experts_in(block: nn.Module) -> str | None:
    """The name of the module of experts in a decoder block; None if it has none."""
    names = (name for name, _ in block.named_modules())
    return next((name for name in names if name.rpartition(".")[2] == _NAME), None)
