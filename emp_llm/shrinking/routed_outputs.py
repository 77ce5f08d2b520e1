"""What the experts of a decoder block give for the tokens that the router sends them.

No architecture has to be known. A module of experts is called in one of three ways:

    experts(hidden, chosen, gates)   It is called once more, every token with one expert at a time
                                     and a gate of 1.
    expert(hidden), one by one       Each output is seen by itself. Its gate is the derivative of
                                     the weighted sum of all outputs with respect to it.
    experts(inputs of all experts)   The router has scaled the inputs (Llama 4), so the gate is in
                                     the output already, and counts as 1.

Shapes in names: E experts, T tokens, K experts that a token is sent to, N outputs of single
experts for single tokens, H hidden size.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree

from emp_llm.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["RoutedOutputs", "observing_experts"]

_ROUTING = 2
"""Arguments of stacked experts behind the hidden states: the chosen experts, and their gates."""


class RoutedOutputs:
    """Sums over the tokens that were sent to each expert of one decoder block.

    Args:
        experts: How many experts there are.

    Attributes:
        tokens_E: float64 [E], how many tokens.
        gates_E: float64 [E], Σ g, where g is what the model multiplies the expert's output by.
        norms_E: float64 [E], Σ ‖f(x)‖₂, where f(x) is the expert's output.
        contributions_E: float64 [E], Σ g ‖f(x)‖₂.
    """

    def __init__(self, experts: int) -> None:
        self.tokens_E, self.gates_E = np.zeros(experts), np.zeros(experts)
        self.norms_E, self.contributions_E = np.zeros(experts), np.zeros(experts)

    def add(self, chosen_N: torch.Tensor, gates_N: torch.Tensor, outputs_NH: torch.Tensor) -> None:
        """Add outputs of single experts: the expert's number, its gate, and the output."""
        experts = len(self.tokens_E)
        norms_N = torch.linalg.vector_norm(outputs_NH, dim=-1, dtype=torch.float32).cpu().numpy()
        chosen = chosen_N.cpu().numpy()
        # numbers from E on stand for no expert, or for one without weights
        real = chosen < experts
        chosen, norms = chosen[real], norms_N[real].astype("f8")
        gates = gates_N.detach().cpu().double().numpy()[real]
        self.tokens_E += np.bincount(chosen, minlength=experts)
        self.gates_E += np.bincount(chosen, gates, experts)
        self.norms_E += np.bincount(chosen, norms, experts)
        self.contributions_E += np.bincount(chosen, gates * norms, experts)


@contextmanager
def observing_experts(block: nn.Module, name: str, into: RoutedOutputs) -> Iterator[None]:
    """Within this ``with`` statement, add what the experts of a decoder block give.

    The block's outputs stay the same, bit for bit.

    Args:
        block: The decoder block, loaded.
        name: Name of the module of all experts in it.
        into: Takes the sums.

    Raises:
        CheckpointError: Within the statement, if the experts are called in another way than above.
    """
    experts = block.get_submodule(name)
    with ExitStack() as stack:
        if isinstance(experts, nn.ModuleList | nn.ModuleDict):
            _observe_each(stack, block, name, experts, into)
        else:
            _replace(stack, experts, _Stacked(experts.forward, into))
        yield


def _replace(stack: ExitStack, module: nn.Module, forward: Callable[..., object]) -> None:
    own = module.forward
    module.forward = forward
    stack.callback(setattr, module, "forward", own)


class _Stacked:
    """The forward of experts that are called with all tokens."""

    def __init__(self, forward: Callable[..., Any], into: RoutedOutputs) -> None:
        self._forward = forward
        self._into = into

    def __call__(self, hidden: torch.Tensor, *routing: torch.Tensor) -> object:
        output = self._forward(hidden, *routing)
        hidden_TH = hidden.reshape(-1, hidden.shape[-1])
        experts = len(self._into.tokens_E)
        if len(routing) == _ROUTING and not routing[0].is_floating_point():
            chosen_TK, gates_TK = routing
            outputs = self._forward(
                hidden_TH.repeat_interleave(chosen_TK.shape[-1], dim=0),
                chosen_TK.reshape(-1, 1),
                torch.ones_like(gates_TK).reshape(-1, 1),
            )
            self._into.add(
                chosen_TK.flatten(), gates_TK.flatten(), outputs.reshape(-1, outputs.shape[-1])
            )
        elif not routing and len(hidden_TH) % experts == 0 and output.shape == hidden_TH.shape:
            sent_N = hidden_TH.any(dim=-1)
            chosen_N = torch.arange(experts).repeat_interleave(len(hidden_TH) // experts)
            outputs_NH = output[sent_N]
            self._into.add(
                chosen_N.to(sent_N.device)[sent_N], outputs_NH.new_ones(len(outputs_NH)), outputs_NH
            )
        else:
            raise CheckpointError(
                f"experts are called with {1 + len(routing)} arguments, in a way that emp-llm does "
                "not know, so their outputs cannot be told apart: choose a score that needs no "
                "data, such as aimer"
            )
        return output


def _observe_each(
    stack: ExitStack,
    block: nn.Module,
    name: str,
    experts: nn.ModuleList | nn.ModuleDict,
    into: RoutedOutputs,
) -> None:
    """Observe experts that are modules of their own."""
    # a list has no forward: the module that it is in calls its experts and adds up their outputs
    own = not isinstance(experts, nn.ModuleList) and type(experts).forward is not nn.Module.forward
    caller = experts if own else block.get_submodule(name.rpartition(".")[0])
    summing = _Summing(caller.forward, into)
    _replace(stack, caller, summing)
    for number, expert in enumerate(experts.children()):
        _replace(stack, expert, partial(summing.seen, number, expert.forward))


class _Summing:
    """The forward of a module that calls experts one by one, and adds up what they give."""

    def __init__(self, forward: Callable[..., Any], into: RoutedOutputs) -> None:
        self._forward = forward
        self._into = into
        self._outputs: list[tuple[int, torch.Tensor]] = []

    def seen(
        self, number: int, forward: Callable[..., torch.Tensor], *args: object, **kwargs: object
    ) -> torch.Tensor:
        """An expert's output, which the gradient below is taken with respect to."""
        output = forward(*args, **kwargs).detach().requires_grad_()
        self._outputs.append((number, output))
        return output

    def __call__(self, *args: object, **kwargs: object) -> object:
        with torch.enable_grad():
            result = self._forward(*args, **kwargs)
            total = (result[0] if isinstance(result, tuple) else result).sum()
        seen, self._outputs = self._outputs, []
        if seen:
            outputs = [output for _, output in seen]
            gradients = torch.autograd.grad([total], outputs)
            for (number, output), gradient in zip(seen, gradients, strict=True):
                output_NH = output.detach().reshape(-1, output.shape[-1])
                # the same in each of an output's columns
                gates_N = gradient.reshape(output_NH.shape)[:, 0]
                self._into.add(
                    torch.full_like(gates_N, number, dtype=torch.int64), gates_N, output_NH
                )
        return _pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, result)
