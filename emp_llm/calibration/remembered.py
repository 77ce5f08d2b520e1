"""Outputs of a unit's parts, so that they are not computed again in its next run on a sample.

While a unit is pruned in stages, each sample is run through it again and again. Up to the first
product of a target that may still change, all is as in the run before: attention, as a rule, where
the MLP is pruned, and in the end the gate and up projections as well. What such parts gave is kept,
in memory only, and taken in place of their next outputs.
"""

from __future__ import annotations

import functools
from collections import Counter
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
    """What parts of the unit gave for one sample.

    Attributes:
        values: The outputs, by number of the part and of its call.
        versions: For each of them, how often its tensors had been written to when it was kept.
    """

    values: dict[tuple[int, int], object] = field(default_factory=dict)
    versions: dict[tuple[int, int], list[int]] = field(default_factory=dict)


class Remembered:
    """The outputs of a unit's parts: of modules that hold targets themselves, and of all others.

    A context manager: within it, parts take over what they gave when the unit was run on the sample
    before, unless they hold targets that may have changed since, come after such, or have outputs
    that were written to meanwhile.

    Args:
        name: The unit's name.
        unit: Its module.
        targets: Names of its parameters that are targets.
        activations: Where outputs wait.
        memory: Bytes that they may take; what does not fit is computed again.

    Attributes:
        changing: Names of the targets that may still change, or whose inputs are observed: what
            comes from them is not kept. All of them at first; it may only become less.
    """

    def __init__(
        self,
        name: str,
        unit: nn.Module,
        targets: Collection[str],
        activations: Activations,
        memory: int,
    ) -> None:
        self.changing = frozenset(targets)
        self._parts = list(_parts(self.changing, name, unit)) if memory > 0 else []
        self._activations = activations
        self._memory = memory
        self._known: dict[int, _Outputs] = {}
        self._here: _Outputs | None = None
        self._calls: Counter[int] = Counter()
        self._recording = False

    def __enter__(self) -> Remembered:
        for number, (part, targets) in enumerate(self._parts):
            part.forward = self._remembering(number, part.forward, targets)
        return self

    def __exit__(self, *_error: object) -> None:
        for part, _ in self._parts:
            del part.forward  # of the instance: the class still has its own

    @contextmanager
    def run(self, call: Call, *, last: bool = False) -> Iterator[None]:
        """Within this ``with`` statement, the unit is run on a sample, perhaps for the last time.

        After the last time, what is kept of the sample is released.
        """
        outputs = self._known.pop(call.sample, None)
        if outputs is None:
            outputs = _Outputs()
        else:
            self._activations.bring_back((self, call.sample))
        self._here, self._calls, self._recording = outputs, Counter(), not last
        try:
            yield
        finally:
            self._here = None
            if last:
                self._memory += sum(map(_nbytes, outputs.values.values()))
            else:
                self._known[call.sample] = outputs
                self._activations.put_away((self, call.sample), tensors_of(outputs.values))

    def observing(self, observe: Observe) -> Observe:
        """The same function, to be called before a product, for runs of the unit."""

        def noting(matrix: ParameterMatrix, x_TC: torch.Tensor) -> None:
            if matrix[0] in self.changing:
                self._recording = False  # what parts give from here on changes with the target
            observe(matrix, x_TC)

        return noting

    def _remembering(
        self, number: int, forward: Callable[..., object], targets: frozenset[str]
    ) -> Callable[..., object]:
        # the signature stays visible: models look at it to choose what they pass
        @functools.wraps(forward)
        def remembering(*args: object, **kwargs: object) -> object:
            outputs = self._here
            if outputs is None or targets & self.changing:
                return forward(*args, **kwargs)
            key = number, self._calls[number]
            self._calls[number] += 1
            if key in outputs.values:
                if _versions(outputs.values[key]) == outputs.versions[key]:
                    return outputs.values[key]
                self._memory += _nbytes(outputs.values.pop(key))
            before = _versions((args, kwargs))
            self._here = None  # a part that calls another one is a part as a whole
            value = forward(*args, **kwargs)
            self._here = outputs
            # what writes to its inputs does more than its output tells
            self._keep(outputs, key, value, pure=_versions((args, kwargs)) == before)
            return value

        return remembering

    def _keep(self, outputs: _Outputs, key: tuple[int, int], value: object, *, pure: bool) -> None:
        """Keep an output if there is room, and nothing before it is missing."""
        nbytes = _nbytes(value)
        self._recording = self._recording and pure and nbytes <= self._memory
        if self._recording:
            self._memory -= nbytes
            outputs.values[key], outputs.versions[key] = value, _versions(value)


def _nbytes(value: object) -> int:
    """Bytes of the tensors in a value, of which each has its own memory."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors_of(value))


def _versions(value: object) -> list[int]:
    """How often each tensor in a value was written to."""
    return [tensor._version for tensor in tensors_of(value)]


def _parts(
    targets: frozenset[str], name: str, module: nn.Module
) -> Iterator[tuple[nn.Module, frozenset[str]]]:
    """The modules in one that hold targets themselves, and the largest ones without any.

    The latter only if they hold matrices. Yields each with the targets in it.
    """
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}"
        own = frozenset(f"{path}.{one}" for one, _ in child.named_parameters(recurse=False))
        inside = targets.intersection(f"{path}.{one}" for one, _ in child.named_parameters())
        if inside and not own & targets:
            yield from _parts(targets, path, child)
        elif inside or any(parameter.ndim > 1 for parameter in child.parameters()):
            yield child, inside
