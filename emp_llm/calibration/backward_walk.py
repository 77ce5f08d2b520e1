"""Gradients of the loss with respect to weights, one block's in memory at a time.

The samples walk through the model and leave, at each block, a copy of what it was given. Then the
blocks are gone through from the last to the first: each is run again on what it was given, and
passes the gradient of its outputs on to its weights and its inputs. What a model computes between
blocks is recorded as torch always does it, so gradients find their way through that as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree

from emp_llm.calibration.activations import tensors_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from emp_llm.calibration.activations import Activations
    from emp_llm.calibration.sample_walk import Call, Walk
    from emp_llm.calibration.streamed_model import StreamedModel

__all__ = ["Backward"]


@dataclass(eq=False)
class _Passage:
    """One sample's way through one block.

    Attributes:
        unit: The block.
        sample: The sample's number.
        inputs: Copies of the leaves of what the block was called with.
        shape: How these were arranged.
        edges: For each leaf where its gradient goes; None where nowhere.
        gradients: Of the block's outputs, by their number among its tensors.
    """

    unit: str
    sample: int
    inputs: list[Any]
    shape: _pytree.TreeSpec
    edges: list[Any]
    gradients: dict[int, torch.Tensor] = field(default_factory=dict)


class _Gate(torch.autograd.Function):
    """What a block gave, as a tensor whose gradient a passage takes."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        _anchor: torch.Tensor,
        value: torch.Tensor,
        passage: _Passage,
        number: int,
    ) -> torch.Tensor:
        ctx.passage, ctx.number = passage, number
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, ...]:  # noqa: ANN401
        known = ctx.passage.gradients.get(ctx.number)
        ctx.passage.gradients[ctx.number] = gradient if known is None else known + gradient
        return None, None, None, None


class Backward:
    """The way there, and the way back.

    Args:
        model: The model.
        activations: Where copies wait.
    """

    def __init__(self, model: StreamedModel, activations: Activations) -> None:
        self._model = model
        self._activations = activations
        self._passages: list[list[_Passage]] = []
        self._anchor = torch.zeros((), requires_grad=True)

    def record(
        self,
        walk: Walk,
        unit: str,
        calls: list[Call],
        run: Callable[[Walk, str, Call], Any],
    ) -> None:
        """Let all samples pass a block, whose weights are loaded, and remember it.

        Args:
            walk: Their walk.
            unit: The block.
            calls: The samples at it.
            run: Gives what a block gives for a sample.
        """
        passages = []
        for call in calls:
            with walk.present(call):
                leaves, shape = _pytree.tree_flatten((call.args, call.kwargs))
                passage = _Passage(
                    unit,
                    call.sample,
                    [_copy(leaf) for leaf in leaves],
                    shape,
                    [_edge(leaf) for leaf in leaves],
                )
                outcome = run(walk, unit, call)
                del leaves
                self._activations.put_away(passage, tensors_of(passage.inputs))
                walk.pass_on(call, self._gated(outcome, passage))
                passages.append(passage)
        self._passages.append(passages)

    def gradients(
        self,
        parameters: Callable[[str], Collection[str]],
        forward: Callable[[str], Callable[..., Any]],
        passed: Callable[[], None],
    ) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
        """Go back through all blocks; the loss has told the last ones its gradients.

        Args:
            parameters: Gives the names of a block's parameters that gradients are wanted of.
            forward: Gives a block's own forward.
            passed: Told each time that all samples have passed a block.

        Yields:
            Each block, which is loaded, with float32 gradients by the names of its parameters.
        """
        visits = [passages[0].unit for passages in self._passages]
        sums: dict[str, dict[str, torch.Tensor]] = {}
        while self._passages:
            passages = self._passages.pop()
            unit = passages[0].unit
            self._model.load(unit)
            found = sums.setdefault(unit, {})
            for name in parameters(unit):
                parameter = self._model.model.get_parameter(name)
                parameter.requires_grad_()
                total = found.setdefault(name, torch.zeros_like(parameter, dtype=torch.float32))
                hook: Any = parameter.register_post_accumulate_grad_hook
                hook(_adding_to(total))
            while passages:
                self._back(passages.pop(), forward(unit))
            passed()
            if unit not in visits[: len(self._passages)]:  # else it comes again, further ahead
                yield unit, sums.pop(unit)
            self._model.release(unit)

    def _gated(self, outcome: Any, passage: _Passage) -> Any:  # noqa: ANN401
        leaves, shape = _pytree.tree_flatten(outcome)
        apply: Any = _Gate.apply
        gated = [
            apply(self._anchor, leaf, passage, number) if _is_float(leaf) else leaf
            for number, leaf in enumerate(leaves)
        ]
        return _pytree.tree_unflatten(gated, shape)

    def _back(self, passage: _Passage, forward: Callable[..., Any]) -> None:
        self._activations.bring_back(passage)
        for leaf, edge in zip(passage.inputs, passage.edges, strict=True):
            if edge is not None:
                leaf.requires_grad_()
        args, kwargs = _pytree.tree_unflatten(passage.inputs, passage.shape)
        with torch.enable_grad():
            leaves, _ = _pytree.tree_flatten(forward(*args, **kwargs))
        ends = [
            (leaves[number], gradient)
            for number, gradient in passage.gradients.items()
            if leaves[number].requires_grad
        ]
        passage.gradients.clear()
        if ends:
            torch.autograd.backward([end for end, _ in ends], [value for _, value in ends])
        onward = [
            (edge, leaf.grad)
            for leaf, edge in zip(passage.inputs, passage.edges, strict=True)
            if edge is not None and leaf.grad is not None
        ]
        if onward:
            # what lies between blocks may lead on to several of them
            edges, values = zip(*onward, strict=True)
            torch.autograd.backward(list(edges), list(values), retain_graph=True)
        passage.inputs.clear()
        passage.edges.clear()


def _is_float(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _copy(leaf: Any) -> Any:  # noqa: ANN401
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def _edge(leaf: Any) -> Any:  # noqa: ANN401
    tracked = isinstance(leaf, torch.Tensor) and leaf.requires_grad
    return get_gradient_edge(leaf) if tracked else None


def _adding_to(total: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def add(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None  # noqa: S101 (the hook is called when it is there)
        total.add_(parameter.grad)
        parameter.grad = None

    return add
