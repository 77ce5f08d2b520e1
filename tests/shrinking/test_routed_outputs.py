"""What is summed up of each expert's outputs, against loops over tokens in plain torch.

Shapes in names: E experts, T tokens, H hidden size.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support.architectures import make_model
from torch import nn
from torch.nn.functional import silu
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
)

from emp_llm.errors import CheckpointError
from emp_llm.shrinking.routed_outputs import RoutedOutputs, observing_experts

E, T, H = 4, 12, 16

Expert = Callable[[torch.Tensor], torch.Tensor]
"""One expert of one token, [H] → [H]."""


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    """As a calibration runs a model."""
    with torch.no_grad():
        yield


def hidden_states() -> torch.Tensor:
    return torch.randn(1, T, H, generator=torch.Generator().manual_seed(3))


def observed(block: nn.Module, name: str = "experts") -> RoutedOutputs:
    """What is seen of the experts of a module that is called with hidden states."""
    sums = RoutedOutputs(E)
    before = block(hidden_states())
    with observing_experts(block, name, sums):
        within = block(hidden_states())
    after = block(hidden_states())
    for one, other, another in zip(*map(as_tuple, (before, within, after)), strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, another)
        assert not other.requires_grad
    return sums


def as_tuple(output: Any) -> tuple[torch.Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def check(
    sums: RoutedOutputs, routed: list[dict[int, float]], experts: Callable[[int], Expert]
) -> None:
    """Compare with a loop over tokens and the experts that they are sent to, with their gates."""
    tokens, gates, norms, contributions = torch.zeros((4, E), dtype=torch.float64)
    for x_H, gate_of in zip(hidden_states()[0], routed, strict=True):
        for expert, gate in gate_of.items():
            norm = experts(expert)(x_H).double().square().sum().sqrt()
            tokens[expert] += 1
            gates[expert] += gate
            norms[expert] += norm
            contributions[expert] += gate * norm
    assert tokens.min() > 0
    assert sums.tokens_E.tolist() == tokens.tolist()
    for found, expected in (
        (sums.gates_E, gates),
        (sums.norms_E, norms),
        (sums.contributions_E, contributions),
    ):
        np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5)


def chosen(scores_TE: torch.Tensor, count: int = 2) -> list[list[int]]:
    """The experts with the largest scores of each token."""
    return [sorted(range(E), key=lambda e: -scores_E[e])[:count] for scores_E in scores_TE]


def tiny(architecture: str, **overrides: Any) -> nn.Module:
    """The last decoder block's module of routed experts."""
    model: Any = make_model(architecture, dtype=torch.float32, **overrides)
    for parameter in model.parameters():  # large enough that tokens are not all routed alike
        parameter.data *= 8
    layer = model.model.layers[-1]
    block: nn.Module = getattr(layer, "mlp", None) or layer.feed_forward
    return block


def test_mixtral() -> None:
    block: Any = tiny("mixtral")
    logits_TE = hidden_states()[0] @ block.gate.weight.T
    routed = []
    for exponents_E, experts in zip(logits_TE.exp(), chosen(logits_TE), strict=True):
        total = sum(exponents_E[e].item() for e in experts)
        routed.append({e: exponents_E[e].item() / total for e in experts})

    def expert(number: int) -> Expert:
        gate, up = block.experts.gate_up_proj[number].chunk(2)
        return lambda x_H: block.experts.down_proj[number] @ (silu(gate @ x_H) * (up @ x_H))

    check(observed(block), routed, expert)


def test_qwen2_moe_whose_gates_do_not_add_up_to_1() -> None:
    block: Any = tiny("qwen2-moe")
    gates_TE = torch.softmax(hidden_states()[0] @ block.gate.weight.T, dim=-1)
    routed = [
        {e: gates_E[e].item() for e in experts}
        for gates_E, experts in zip(gates_TE, chosen(gates_TE), strict=True)
    ]

    def expert(number: int) -> Expert:
        gate, up = block.experts.gate_up_proj[number].chunk(2)
        return lambda x_H: block.experts.down_proj[number] @ (silu(gate @ x_H) * (up @ x_H))

    check(observed(block), routed, expert)


def test_gpt_oss_with_its_biases() -> None:
    block: Any = tiny("gpt-oss")
    logits_TE = hidden_states()[0] @ block.router.weight.T + block.router.bias
    routed = []
    for exponents_E, experts in zip(logits_TE.exp(), chosen(logits_TE), strict=True):
        total = sum(exponents_E[e].item() for e in experts)
        routed.append({e: exponents_E[e].item() / total for e in experts})

    def expert(number: int) -> Expert:
        def run(x_H: torch.Tensor) -> torch.Tensor:
            both = x_H @ block.experts.gate_up_proj[number]
            both = both + block.experts.gate_up_proj_bias[number]
            gate, up = both[::2].clamp(max=7), both[1::2].clamp(-7, 7)
            inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            return inner @ block.experts.down_proj[number] + block.experts.down_proj_bias[number]

        return run

    check(observed(block), routed, expert)


def test_llama4_whose_router_scales_the_inputs() -> None:
    block: Any = tiny("llama4")
    logits_TE = hidden_states()[0] @ block.router.weight.T
    scales_TE = torch.sigmoid(logits_TE)
    experts_T = [experts[0] for experts in chosen(logits_TE, 1)]
    sums = observed(block)
    expected = torch.zeros(E, dtype=torch.float64)
    for x_H, scales_E, e in zip(hidden_states()[0], scales_TE, experts_T, strict=True):
        gate, up = (scales_E[e] * x_H @ block.experts.gate_up_proj[e]).chunk(2)
        expected[e] += ((up * silu(gate)) @ block.experts.down_proj[e]).double().norm()
    assert sums.tokens_E.tolist() == [experts_T.count(e) for e in range(E)]
    np.testing.assert_allclose(sums.contributions_E, expected.numpy(), rtol=1e-5)
    np.testing.assert_allclose(sums.norms_E, expected.numpy(), rtol=1e-5)


def test_switch_transformers_whose_experts_are_modules_of_a_dict() -> None:
    config = SwitchTransformersConfig(
        d_model=H, d_ff=8, num_experts=E, expert_capacity=T, dropout_rate=0, vocab_size=32
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block: Any = SwitchTransformersSparseMLP(config).eval()
        for parameter in block.parameters():
            nn.init.normal_(parameter)
    gates_TE = torch.softmax(hidden_states()[0] @ block.router.classifier.weight.T, dim=-1)
    routed = [
        {experts[0]: gates_E[experts[0]].item()}
        for gates_E, experts in zip(gates_TE, chosen(gates_TE, 1), strict=True)
    ]

    def expert(number: int) -> Expert:
        inner = block.experts[f"expert_{number}"]
        return lambda x_H: inner.wo.weight @ torch.relu(inner.wi.weight @ x_H)

    check(observed(block), routed, expert)


class ListOfExperts(nn.Module):
    """Experts one by one, as most models had them before transformers 5."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(H, E)
        self.experts = nn.ModuleList(nn.Linear(H, H) for _ in range(E))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x_TH = hidden.view(-1, H)
        gates_TE = torch.softmax(self.router(x_TH), dim=-1)
        gates_TK, chosen_TK = gates_TE.topk(2)
        total_TH = torch.zeros_like(x_TH)
        for number, expert in enumerate(self.experts):
            tokens, place = torch.where(chosen_TK == number)
            output = expert(x_TH[tokens]) * gates_TK[tokens, place, None]
            total_TH.index_add_(0, tokens, output)
        return total_TH.view(hidden.shape), gates_TE


def test_a_list_of_experts() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = ListOfExperts()
    gates_TE = torch.softmax(block.router(hidden_states()[0]), dim=-1)
    routed = [
        {e: gates_E[e].item() for e in experts}
        for gates_E, experts in zip(gates_TE, chosen(gates_TE), strict=True)
    ]

    def expert(number: int) -> Expert:
        linear: Any = block.experts[number]
        return lambda x_H: linear.weight @ x_H + linear.bias

    check(observed(block), routed, expert)


class UnknownExperts(nn.Module):
    def forward(self, hidden: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        return hidden * gates.sum()


class UnknownBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = UnknownExperts()

    def forward(self, hidden: torch.Tensor) -> object:
        return self.experts(hidden, hidden)


def test_experts_that_are_called_in_an_unknown_way_are_refused() -> None:
    block = UnknownBlock()
    with (
        pytest.raises(CheckpointError, match=r"2 arguments.*aimer"),
        observing_experts(block, "experts", RoutedOutputs(E)),
    ):
        block(hidden_states())
