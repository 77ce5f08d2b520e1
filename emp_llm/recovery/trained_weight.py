"""A parameter in training: its values in float32, its zeros, and the moments of its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

__all__ = ["TrainedWeight"]

_MEAN_DECAY, _SQUARE_DECAY = 0.9, 0.95
_EPSILON = 1e-10


class TrainedWeight:
    """A parameter that is trained, and its values in the dense model.

    Adam (Kingma & Ba, arXiv 1412.6980) changes values in float32, and the parameter gets them
    rounded to its own dtype: the model computes with the weights as they will be stored, and small
    steps still add up. A step is at most about `rate` times the root mean square of the weights
    that are kept (as in Adafactor, Shazeer & Stern, arXiv 1804.04235), so one rate fits parameters
    and models of any scale. Pruned weights, and others that are zero, stay zero.

    Args:
        parameter: The parameter, with the values to begin with.
        dense: Its values in the dense model.
        pruned: Whether zeros in it stay.

    Attributes:
        parameter: The parameter; it has the trained values, unless `use_dense` was called.
        dense: Its values in the dense model.
    """

    def __init__(self, parameter: nn.Parameter, dense: torch.Tensor, *, pruned: bool) -> None:
        import torch

        parameter.requires_grad = True
        self.parameter = parameter
        self.dense = dense
        self._own = parameter.data
        self._keep = parameter.data != 0 if pruned else None
        self._values = parameter.detach().float().clone()
        self._mean, self._square = (torch.zeros_like(self._values) for _ in range(2))
        kept = self._values.numel() if self._keep is None else int(self._keep.sum())
        norm = torch.linalg.vector_norm(self._values).item()
        self._scale = norm / max(1, kept) ** 0.5

    @property
    def state(self) -> Mapping[str, torch.Tensor]:
        """What a training goes on from: values, and moments; to be read or overwritten."""
        return {"values": self._values, "mean": self._mean, "square": self._square}

    def use_dense(self) -> None:
        """Have the model compute with the dense values."""
        self.parameter.data = self.dense

    def use_own(self) -> None:
        """Have the model compute with the trained values."""
        self.parameter.data = self._own

    def round(self) -> None:
        """Give the parameter the values, rounded to its dtype."""
        self._own.copy_(self._values)

    def step(self, number: int, rate: float) -> None:
        """Take a step against the gradient that has been accumulated, and clear it.

        Args:
            number: Number of the step, from 1.
            rate: Size of the step, relative to the weights.
        """
        gradient, self.parameter.grad = self.parameter.grad, None
        if gradient is None:  # such as an expert that no token has reached
            return
        gradient = gradient.float()
        if self._keep is not None:
            gradient.mul_(self._keep)
        self._mean.lerp_(gradient, 1 - _MEAN_DECAY)
        self._square.lerp_(gradient.square_(), 1 - _SQUARE_DECAY)
        root = self._square.div(1 - _SQUARE_DECAY**number).sqrt_().add_(_EPSILON)
        size = rate * self._scale / (1 - _MEAN_DECAY**number)
        self._values.addcdiv_(self._mean, root, value=-size)
        self.round()
