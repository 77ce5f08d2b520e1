"""Outputs of a unit's parts that come before its targets, so that they are computed once a sample.

While a unit is pruned in stages, each sample is run through it again and again. Up to the first
product of a target nothing has changed since the first run: attention, as a rule, where the MLP is
pruned. What such parts gave is kept, in memory only, and taken in place of their next outputs.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from emp_llm.calibration.activations import tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    import torch
    from torch import nn

    from emp_llm.calibration.activations import Activations
    from emp_llm.calibration.parameter_map import ParameterMatrix
    from emp_llm.calibration.sample_walk import Call

    Observe = Callable[[ParameterMatrix, torch.Tensor], None]
    """Called before a product, with the matrix and what it is multiplied by, [T, C]."""

__all__ = ["Remembered"]


@dataclass
class _Outputs:
    """What parts of the unit gave for one sample, in the order of their calls.

    Attributes:
        values: The outputs, of the first calls.
        versions: For each of them, how often its tensors had been written to when it was kept.
    """

    values: list[object] = field(default_factory=list)
    versions: list[list[int]] = field(default_factory=list)


class Remembered:
    """The outputs of a unit's parts that hold no target.

    A context manager: within it, parts that were called before any target was multiplied take over
    what they gave when the unit was first run on the sample. A part whose output was written to
    meanwhile is computed again, and so are those after it.

    Args:
        name: The unit's name.
        unit: Its module.
        targets: Names of its parameters that are targets.
        activations: Where outputs wait.
        memory: Bytes that they may take; what does not fit is computed again.
    """

    def __init__(
        self,
        name: str,
        unit: nn.Module,
        targets: Collection[str],
        activations: Activations,
        memory: int,
    ) -> None:
        self._parts = list(_without(targets, name, unit)) if memory > 0 else []
        self._targets = frozenset(targets)
        self._activations = activations
        self._memory = memory
        self._known: dict[int, _Outputs] = {}
        self._here: _Outputs | None = None
        self._calls = 0
        self._recording = False

    def __enter__(self) -> Remembered:
        for part in self._parts:
            part.forward = self._remembering(part.forward)
        return self

    def __exit__(self, *_error: object) -> None:
        for part in self._parts:
            del part.forward  # of the instance: the class still has its own

    @contextmanager
    def run(self, call: Call) -> Iterator[None]:
        """Within this ``with`` statement, the unit is run on a sample."""
        outputs = self._known.get(call.sample)
        self._recording, self._calls = outputs is None, 0
        if outputs is None:
            outputs = self._known[call.sample] = _Outputs()
        else:
            self._activations.bring_back((self, call.sample))
        self._here = outputs
        try:
            yield
        finally:
            self._here = None
            self._activations.put_away((self, call.sample), tensors_of(outputs.values))

    def observing(self, observe: Observe) -> Observe:
        """The same function, to be called before a product, for runs of the unit."""

        def noting(matrix: ParameterMatrix, x_TC: torch.Tensor) -> None:
            if matrix[0] in self._targets:
                self._recording = False  # what parts give from here on changes with the target
            observe(matrix, x_TC)

        return noting

    def forget(self, call: Call) -> None:
        """Release what is kept of a sample, which has gone on."""
        if self._known.pop(call.sample, None) is not None:
            self._activations.bring_back((self, call.sample))

    def _remembering(self, forward: Callable[..., object]) -> Callable[..., object]:
        # the signature stays visible: models look at it to choose what they pass
        @functools.wraps(forward)
        def remembering(*args: object, **kwargs: object) -> object:
            outputs, number = self._here, self._calls
            if outputs is None:
                return forward(*args, **kwargs)
            if (
                number < len(outputs.values)
                and _versions(outputs.values[number]) == outputs.versions[number]
            ):
                self._calls += 1
                return outputs.values[number]
            del outputs.values[number:], outputs.versions[number:]
            before = _versions((args, kwargs))
            self._here = None  # a part that calls another one is a part as a whole
            value = forward(*args, **kwargs)
            self._here = outputs
            # what writes to its inputs does more than its output tells
            self._keep(outputs, value, pure=_versions((args, kwargs)) == before)
            return value

        return remembering

    def _keep(self, outputs: _Outputs, value: object, *, pure: bool) -> None:
        """Keep an output if there is room, and nothing before it is missing."""
        nbytes = sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(value))
        self._recording = self._recording and pure and nbytes <= self._memory
        if self._recording:
            self._memory -= nbytes
            self._calls += 1
            outputs.values.append(value)
            outputs.versions.append(_versions(value))


def _versions(value: object) -> list[int]:
    """How often each tensor in a value was written to."""
    return [tensor._version for tensor in tensors_of(value)]


def _without(targets: Collection[str], name: str, module: nn.Module) -> Iterator[nn.Module]:
    """The largest modules inside of one that hold matrices, and no target."""
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}"
        if any(f"{path}.{own}" in targets for own, _ in child.named_parameters()):
            yield from _without(targets, path, child)
        elif any(parameter.ndim > 1 for parameter in child.parameters()):
            yield child
