"""How far a model's predictions are from those of another one, and the gradient of that.

Shapes in names: L tokens, V words of the vocabulary, S tokens worked on at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["divergence"]

_TOKENS_AT_A_TIME = 128


def divergence(dense_LV: torch.Tensor, logits_LV: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The Kullback-Leibler divergence of predictions from the dense model's, and its gradient.

        KL = 1/L Σ_t Σ_v p_tv (log p_tv - log q_tv),   ∂KL/∂z_tv = (q_tv - p_tv) / L,

    where p is the softmax of the dense model's logits and q that of the logits z: the loss of
    knowledge distillation (Hinton et al., arXiv 1503.02531) at temperature 1. It is computed in
    float32, for a few tokens at a time.

    Args:
        dense_LV: Logits of the dense model, of any float dtype. The gradient takes their place.
        logits_LV: Logits z, of the same dtype.

    Returns:
        KL in nats per token, and its gradient with respect to z in the memory of `dense_LV`.

    >>> import torch
    >>> loss, gradient = divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    >>> round(loss, 4), [round(value, 4) for value in gradient[0].tolist()]
    (0.1201, [-0.2311, 0.2311])
    """
    import torch

    tokens = len(dense_LV)
    total = 0.0
    with torch.no_grad():
        for start in range(0, tokens, _TOKENS_AT_A_TIME):
            some = slice(start, start + _TOKENS_AT_A_TIME)
            log_p_SV = dense_LV[some].float().log_softmax(-1)
            log_q_SV = logits_LV[some].float().log_softmax(-1)
            p_SV = log_p_SV.exp()
            total += (p_SV * (log_p_SV - log_q_SV)).sum().item()
            dense_LV[some] = (log_q_SV.exp_() - p_SV) / tokens
    return total / tokens, dense_LV
