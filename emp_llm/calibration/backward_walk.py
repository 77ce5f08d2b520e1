"""Gradients of the loss with respect to weights, with one unit in memory at a time.

A unit is a decoder block, or a module outside of decoder blocks that holds targets.

This is gradient checkpointing (Chen et al., arXiv 1604.06174) on a streamed model. The samples go
forward through the model; at each unit a copy of its inputs is put aside, and its output is
computed without a graph. Then the units are visited from the last to the first: each is run again
on its inputs, now with a graph, and the gradient of its output is propagated to its weights and its
inputs. What the model computes between units stays in a graph of torch's own, which carries a
gradient from one unit's inputs to the *gate* at the output of the unit before. What a unit writes
to its arguments, as keys and values that later layers share, counts as its output.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import FunctionCtx
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree

from emp_llm.calibration.activations import opened, tensors_of
from emp_llm.calibration.tensor_loading import unchanged

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from torch import nn
    from torch.autograd.graph import GradientEdge

    from emp_llm.calibration.activations import Activations
    from emp_llm.calibration.sample_walk import Call, Walk
    from emp_llm.calibration.streamed_model import StreamedModel

__all__ = ["Backward"]


@dataclass(eq=False)
class _Passage:
    """One sample's passage through one unit.

    Attributes:
        unit: The unit.
        sample: The sample's number.
        inputs: Copies of the leaves of the unit's arguments.
        structure: How the leaves were nested in the arguments.
        edges: For each leaf, where in the graph between units its gradient goes; None for no leaf
            that has one.
        gradients: Gradients of the unit's output, by number of the leaf in it.
    """

    unit: str
    sample: int
    inputs: list[object]
    structure: _pytree.TreeSpec
    edges: list[GradientEdge | None]
    gradients: dict[int, torch.Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class _Written:
    """What a unit has written to states that it was given, for a later unit to read.

    Attributes:
        states: The states, such as keys and values that layers share.
        key: Where it was written.
        value: A tensor, or tensors in a tuple.
    """

    states: MutableMapping[Any, object]
    key: object
    value: object


class _GateContext(FunctionCtx):
    """What a gate remembers for its gradient."""

    passage: _Passage
    number: int


class _Gate(torch.autograd.Function):
    """Begins the graph behind a unit: a leaf of its output, whose gradient the passage keeps."""

    @staticmethod
    def forward(
        ctx: _GateContext,
        _anchor: torch.Tensor,
        value: torch.Tensor,
        passage: _Passage,
        number: int,
    ) -> torch.Tensor:
        ctx.passage, ctx.number = passage, number
        return value.view_as(value)

    @staticmethod
    def backward(ctx: _GateContext, gradient: torch.Tensor) -> tuple[None, ...]:
        known = ctx.passage.gradients.get(ctx.number)
        ctx.passage.gradients[ctx.number] = gradient if known is None else known + gradient
        return None, None, None, None


class Backward:
    """The walk forward, unit by unit, and back.

    Args:
        model: The model.
        activations: Holds the copies of the units' inputs.
        explaining: Returns a context in which errors of the model's own code become ours.
    """

    def __init__(
        self,
        model: StreamedModel,
        activations: Activations,
        explaining: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._model = model
        self._activations = activations
        self._explaining = explaining
        self._passages: list[list[_Passage]] = []
        # a gate needs an input that requires a gradient; without one torch records no graph
        self._anchor = torch.zeros((), requires_grad=True)

    def record(
        self,
        walk: Walk,
        unit: str,
        calls: list[Call],
        run: Callable[[Walk, str, Call], object],
    ) -> None:
        """Let all samples pass a unit, which is loaded, and put copies of its inputs aside.

        Args:
            walk: Their walk.
            unit: The unit.
            calls: The samples at it.
            run: Returns the output of a unit for a sample.
        """
        passages = []
        for call in calls:
            with walk.present(call):
                leaves, structure = _pytree.tree_flatten(opened((call.args, call.kwargs)))
                passage = _Passage(
                    unit,
                    call.sample,
                    [_copy(leaf) for leaf in leaves],
                    structure,
                    [_edge(leaf) for leaf in leaves],
                )
                output = run(walk, unit, call)
                written = _written(call.args, call.kwargs, leaves)
                output, values = self._gated((output, [one.value for one in written]), passage)
                for one, value in zip(written, values, strict=True):
                    one.states[one.key] = value
                del leaves, written, values  # only the copies wait
                self._activations.put_away(passage, tensors_of(passage.inputs))
                walk.pass_on(call, output)
                passages.append(passage)
        self._passages.append(passages)

    def gradients(
        self,
        parameters: Callable[[str], Collection[str]],
        forward: Callable[[str], Callable[..., object]],
        passed: Callable[[str], None],
    ) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Go back through all units, once the gates behind the last ones have their gradients.

        Args:
            parameters: Returns the names of a unit's parameters whose gradients are wanted.
            forward: Returns a unit's own forward.
            passed: Called with each unit that all samples have passed, each time.

        Yields:
            Each unit with the sums of its gradients over all samples: float32, by the names of its
            parameters. A unit comes once, when the first use of its weights is passed: samples may
            pass it several times, and other units may borrow its weights.
        """
        model = self._model
        uses = [model.multiplied_units(passages[0].unit) for passages in self._passages]
        sums: dict[str, dict[str, torch.Tensor]] = {}
        while self._passages:
            passages, used = self._passages.pop(), uses.pop()
            unit = passages[0].unit
            model.load(unit, unchanged)
            for one in used:
                if one in sums:
                    self._activations.bring_back(one)
                else:
                    sums[one] = {name: self._zeros(name) for name in parameters(one)}
                _add_gradients(model.multiplied(unit), sums[one])
            while passages:
                passage = passages.pop()
                self._activations.bring_back(passage)
                with self._explaining():
                    self._back(passage, forward(unit))
            passed(unit)
            model.release(unit)
            for one in used:
                if any(one in before for before in uses):
                    self._activations.put_away(one, sums[one].values())
                else:
                    yield one, sums.pop(one)

    def _zeros(self, parameter: str) -> torch.Tensor:
        shape = self._model.model.get_parameter(parameter).shape
        return torch.zeros(shape, dtype=torch.float32, device=self._model.device)

    def _gated(
        self, output: tuple[object, list[object]], passage: _Passage
    ) -> tuple[object, list[object]]:
        """What a unit gives, with a gate at each leaf that can have a gradient."""
        leaves, structure = _pytree.tree_flatten(output)
        apply: Any = _Gate.apply
        gated = [
            apply(self._anchor, leaf, passage, number) if _is_float(leaf) else leaf
            for number, leaf in enumerate(leaves)
        ]
        result: tuple[object, list[object]] = _pytree.tree_unflatten(gated, structure)
        return result

    def _back(self, passage: _Passage, forward: Callable[..., object]) -> None:
        """Propagate the gradient of one passage's output to the unit's weights and inputs."""
        tracked = [
            (leaf, edge)
            for leaf, edge in zip(passage.inputs, passage.edges, strict=True)
            if edge is not None and isinstance(leaf, torch.Tensor)
        ]
        for leaf, _ in tracked:
            leaf.requires_grad_()
        args, kwargs = _pytree.tree_unflatten(passage.inputs, passage.structure)
        with torch.enable_grad():
            output = forward(*args, **kwargs)
        written = _written(args, kwargs, passage.inputs)
        leaves, _ = _pytree.tree_flatten((output, [one.value for one in written]))
        ends = [
            (leaves[number], gradient)
            for number, gradient in passage.gradients.items()
            if leaves[number].requires_grad
        ]
        passage.gradients.clear()
        if ends:
            torch.autograd.backward([end for end, _ in ends], [value for _, value in ends])
        onward = [(edge, leaf.grad) for leaf, edge in tracked if leaf.grad is not None]
        if onward:
            # the graph between units is kept: several units may need the same piece of it
            edges, values = zip(*onward, strict=True)
            torch.autograd.backward(list(edges), list(values), retain_graph=True)
        passage.inputs.clear()
        passage.edges.clear()


def _written(
    args: Sequence[object], kwargs: Mapping[str, object], before: Sequence[object]
) -> list[_Written]:
    """What a unit has written to its arguments, whose leaves were others before."""
    known = {id(leaf) for leaf in before}
    return [
        _Written(states, key, value)
        for states in (*args, *kwargs.values())
        if isinstance(states, MutableMapping)
        for key, value in states.items()
        if any(id(tensor) not in known for tensor in tensors_of(value))
    ]


def _is_float(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _copy(leaf: object) -> object:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def _edge(leaf: object) -> GradientEdge | None:
    if isinstance(leaf, torch.Tensor) and leaf.requires_grad:
        return get_gradient_edge(leaf)
    return None


def _add_gradients(weights: Mapping[str, nn.Parameter], sums: Mapping[str, torch.Tensor]) -> None:
    """Have the gradients of weights added to sums, as soon as they are there."""
    for name in sums.keys() & weights.keys():
        weights[name].requires_grad_()
        hook: Any = weights[name].register_post_accumulate_grad_hook
        hook(_adding_to(sums[name]))


def _adding_to(total: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """A hook that moves a parameter's gradient to a sum in float32."""

    def add(parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            total.add_(parameter.grad)
            parameter.grad = None

    return add
