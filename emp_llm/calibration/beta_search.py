"""Search for the smallest β whose loss on the calibration data stays within a bound, by bisection.

The loss is the mean cross entropy of the samples in nats per token, of the model as it would be
written: pruned by the criterion, and repaired if that is asked for.
"""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from emp_llm.calibration.calibrate import Calibration
from emp_llm.calibration.session import Session, recording
from emp_llm.calibration.tensor_loading import unchanged
from emp_llm.errors import OptionError
from emp_llm.report.tensor_statistics import digits
from emp_llm.selection.mask_store import MaskStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from emp_llm.pruning.plan import PruningPlan
    from emp_llm.report.fields import Trial
    from emp_llm.runtime.workers import Workers

__all__ = ["bisect_beta", "search_beta"]

_CLOSE = 0.02
"""The search ends when the interval that the result lies in is this narrow, relatively."""

_LEAST, _MOST = 1 / 64, 64.0
"""The smallest and the largest β that are tried: next to nothing stays, or nothing goes."""

_MOST_NATS = 138.0
"""Nats of the largest perplexity that is reported, 1e60."""


def search_beta(plan: PruningPlan, workers: Workers, store: MaskStore) -> tuple[float, list[Trial]]:
    """Search for the least β at which the loss rises by no more than `max_loss_increase` percent.

    Args:
        plan: The targets, and the rule.
        workers: The threads and devices that read and count, and their progress.
        store: Keeps the result, for the same run when it is continued.

    Returns:
        β, and what was tried, in order: ``beta`` (None for the dense model), ``loss`` in nats per
        token and ``perplexity``.

    Raises:
        CheckpointError: As `emp_llm.calibration.calibrate.calibrate` does.
        OptionError: As there, and if no β up to 64 keeps the loss that low.
        OSError: As there.
        ValueError: If the options set no bound on the loss.
    """
    known = store.notes.get("search")
    if known is None:
        most = plan.options.max_loss_increase
        if most is None:
            raise ValueError("there is no max_loss_increase to search β by")
        known = _search(plan, workers, store.folder, 1 + most / 100)
        store.note("search", known)
    return known["beta"], known["tried"]


def _search(plan: PruningPlan, workers: Workers, folder: Path, allowed: float) -> dict[str, Any]:
    """Search for the least β whose loss is `allowed` times that of the dense model, or less."""
    tried: list[Trial] = []
    with plan.source.files(plan.checkpoint.shards) as files, recording():
        session = Session(plan, workers.progress, files, folder)

        def note(beta: float | None, loss: float) -> float:
            tried.append({"beta": beta, "loss": digits(loss), "perplexity": _perplexity(loss)})
            return loss

        def measure(beta: float) -> float:
            with (
                TemporaryDirectory(dir=folder) as scratch,
                MaskStore(Path(scratch) / "tried") as masks,
            ):
                calibration = Calibration(plan.with_beta(beta), workers, files, session)
                calibration.mask(masks)
                session.begin(f"measuring β = {beta:g}")
                return note(beta, session.loss(calibration.changed(masks)))

        session.begin("measuring the dense model")
        dense = note(None, session.loss(unchanged))
        beta = bisect_beta(measure, dense * allowed)
    return {"beta": beta, "tried": tried}


def bisect_beta(measure: Callable[[float], float], most: float) -> float:
    """The least β, of those that are tried, whose loss is at most `most`.

    Starting from 1, β is halved while its loss is low enough, or doubled while it is not. Then the
    interval between the last two is halved until it is at most 2 % wide.

    Args:
        measure: Returns the loss at a β; it falls as β rises.
        most: The largest loss that is low enough.

    Raises:
        OptionError: If the loss is too large at every β up to 64.

    >>> tried = []
    >>> bisect_beta(lambda beta: tried.append(beta) or 1 / beta, 1.25)
    0.812
    >>> tried
    [1.0, 0.5, 0.75, 0.875, 0.812, 0.781, 0.796]
    """
    low, high = 0.0, 1.0
    if measure(high) <= most:
        while high / 2 >= _LEAST and measure(high / 2) <= most:
            high /= 2
        low = high / 2
    else:
        low, high = high, 2 * high
        while measure(high) > most:
            low, high = high, 2 * high
            if high > _MOST:
                raise OptionError(
                    f"no β up to {low:g} keeps the loss on the calibration data within {most:.4f} "
                    "nats per token: allow a larger increase"
                )
    while high - low > _CLOSE * high:
        middle = (low + high) / 2
        # a number of 3 digits is easy to type again, and they lie closer together than _CLOSE
        middle = round(middle, max(3, 2 - math.floor(math.log10(middle))))
        if measure(middle) <= most:
            high = middle
        else:
            low = middle
    return high


def _perplexity(loss: float) -> float:
    return digits(math.exp(min(loss, _MOST_NATS)))
