"""The loss of distillation and its gradient, against torch's own."""

import pytest
import torch
from torch.nn.functional import kl_div

from emp_llm.recovery.divergence import divergence


@pytest.mark.parametrize("tokens", [1, 127, 128, 300])
def test_loss_and_gradient_are_those_that_torch_derives(tokens: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    dense, logits = (3 * torch.randn(tokens, 40, generator=generator) for _ in range(2))
    logits.requires_grad = True
    expected = kl_div(
        logits.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="sum"
    )
    (expected / tokens).backward()
    assert logits.grad is not None

    loss, gradient = divergence(dense.clone(), logits)

    assert loss == pytest.approx(expected.item() / tokens, rel=1e-5)
    assert torch.allclose(gradient, logits.grad, atol=1e-7)


def test_equal_predictions_are_no_loss_whatever_is_added_to_all_logits() -> None:
    logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))

    loss, gradient = divergence(logits + 7, logits)

    assert loss == pytest.approx(0, abs=1e-6)
    assert gradient.abs().max() < 1e-6
