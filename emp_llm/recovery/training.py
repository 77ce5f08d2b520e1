"""The steps of a recovery: each on samples of its own, towards the dense model's predictions."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch

from emp_llm.errors import CheckpointError
from emp_llm.recovery.divergence import divergence

if TYPE_CHECKING:
    from emp_llm.calibration.session import Session
    from emp_llm.recovery.saved_state import SavedState
    from emp_llm.recovery.trained_model import TrainedModel
    from emp_llm.runtime.progress import SharedProgress

__all__ = ["SAMPLES_PER_STEP", "relative_rate", "train"]

SAMPLES_PER_STEP = 2
"""Samples whose gradients are added up for a step."""

_RATE = 1e-3
_WARM_UP = 0.05
_SAVE_SECONDS = 120.0


def relative_rate(step: int, steps: int) -> float:
    """The size of a step, relative to the weights: a linear rise, then half a cosine.

    Args:
        step: Number of the step, from 1.
        steps: How many there are.

    >>> [round(relative_rate(step, 40) * 1e4, 2) for step in (1, 2, 21, 40)]
    [5.0, 10.0, 5.2, 0.02]
    """
    rise = max(1, round(_WARM_UP * steps))
    if step <= rise:
        return _RATE * step / rise
    done = (step - rise) / (steps - rise + 1)
    return _RATE * 0.5 * (1 + math.cos(math.pi * done))


def train(
    session: Session,
    model: TrainedModel,
    steps: int,
    state: SavedState,
    progress: SharedProgress,
) -> None:
    """Train a model, or go on with a training that was interrupted.

    Args:
        session: The samples: `SAMPLES_PER_STEP` for each step.
        model: The model.
        steps: How many steps to take in all.
        state: Keeps the state, every few minutes.
        progress: Reports the steps.

    Raises:
        CheckpointError: If the model does not run, or gives NaN or infinity.
        OSError: If the state cannot be saved.
    """
    progress.begin("recovering", steps, "steps")
    first = state.load(model.weights)
    progress.advance(first)
    saved = time.monotonic()
    for step in range(first + 1, steps + 1):
        for sample in range((step - 1) * SAMPLES_PER_STEP, step * SAMPLES_PER_STEP):
            _add_gradient(session, model, sample)
        for weight in model.weights.values():
            weight.step(step, relative_rate(step, steps))
        progress.advance(1)
        if time.monotonic() - saved >= _SAVE_SECONDS:
            state.save(step, model.weights)
            saved = time.monotonic()


def _add_gradient(session: Session, model: TrainedModel, sample: int) -> None:
    """Add the gradient of one sample's divergence to those of the weights."""
    with torch.no_grad(), model.dense():
        dense_LV = session.logits(sample)
    logits_LV = session.logits(sample)
    loss, gradient_LV = divergence(dense_LV, logits_LV)
    if not math.isfinite(loss):
        raise CheckpointError(
            f"recover: sample {sample} of {session.samples.text}: predictions are NaN or infinite; "
            "leave --recover out, or give another text"
        )
    torch.autograd.backward([logits_LV], [gradient_LV.div_(SAMPLES_PER_STEP)])
