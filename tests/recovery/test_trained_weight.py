"""The optimizer of a recovery against torch's Adam."""

import torch
from torch import nn

from emp_llm.recovery.trained_weight import TrainedWeight

RATE = 0.01


def start() -> torch.Tensor:
    return torch.randn(6, 10, generator=torch.Generator().manual_seed(1)) * 0.05


def test_steps_are_those_of_adam_relative_to_the_root_mean_square() -> None:
    inputs = torch.randn(20, 10, generator=torch.Generator().manual_seed(2))
    ours, theirs = nn.Parameter(start()), nn.Parameter(start())
    weight = TrainedWeight(ours, start(), pruned=False)
    scale = start().double().square().mean().sqrt().item()
    adam = torch.optim.Adam([theirs], lr=RATE * scale, betas=(0.9, 0.95), eps=1e-10)
    for number in range(1, 9):
        for parameter in (ours, theirs):
            ((inputs @ parameter.T).tanh() - 1).square().mean().backward()
        weight.step(number, RATE)
        adam.step()
        adam.zero_grad()
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ours, start(), atol=1e-3)


def test_pruned_weights_stay_zero_and_do_not_count_in_the_size_of_steps() -> None:
    values = start()
    values[:, ::2] = 0
    parameter = nn.Parameter(values.clone())
    weight = TrainedWeight(parameter, start(), pruned=True)
    parameter.grad = torch.ones_like(values)
    weight.step(1, RATE)
    kept = values != 0
    assert not parameter[~kept].any()
    # the first step of Adam is of one size for all weights
    step = RATE * values[kept].square().mean().sqrt()
    assert torch.allclose(values[kept] - parameter[kept], step.expand(kept.sum()), rtol=1e-3)


def test_steps_smaller_than_the_rounding_of_bfloat16_add_up() -> None:
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    weight = TrainedWeight(parameter, parameter.data.clone(), pruned=False)
    for number in range(1, 21):
        parameter.grad = torch.ones_like(parameter)
        weight.step(number, 0.001)
    assert torch.equal(parameter.data, torch.full_like(parameter, 1 - 20 * 0.001))


def test_the_model_computes_with_either_values() -> None:
    parameter = nn.Parameter(torch.ones(4))
    weight = TrainedWeight(parameter, torch.zeros(4), pruned=False)
    weight.use_dense()
    assert not parameter.any()
    weight.use_own()
    assert parameter.all()


def test_a_parameter_that_no_gradient_reaches_keeps_its_values() -> None:
    parameter = nn.Parameter(start())
    TrainedWeight(parameter, start(), pruned=True).step(1, RATE)
    assert torch.equal(parameter.data, start())
