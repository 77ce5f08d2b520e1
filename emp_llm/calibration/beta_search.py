"""The β that a loss allows: bisection on the calibration data, with few evaluations.

The loss is the mean cross entropy in nats per token of the samples, of the model as it would be
written: pruned by the criterion, and repaired if that is asked for.
"""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from emp_llm.calibration.calibrate import Calibration
from emp_llm.calibration.forward_walk import unchanged
from emp_llm.calibration.session import Session, recording
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
"""The search ends when the least β that is good enough is known this closely, relatively."""

_LEAST, _MOST = 1 / 64, 64.0
"""No β out of these is tried: next to nothing stays, or nothing goes."""

_LONGEST = 138.0
"""Nats whose perplexity, 1e60, is the largest that is told."""


def search_beta(plan: PruningPlan, workers: Workers, store: MaskStore) -> tuple[float, list[Trial]]:
    """Search for the least β by which the loss rises by no more than is allowed.

    Args:
        plan: What is to be pruned, and by which rule.
        workers: What reads and counts.
        store: Where the answer is kept, for the same run when it goes on.

    Returns:
        The β, and what was tried, in order: ``beta`` (None for the dense model), ``loss`` in nats
        per token and ``perplexity``.

    Raises:
        CheckpointError: As `emp_llm.calibration.calibrate.calibrate` does.
        OptionError: As there.
        OSError: As there.
    """
    known = store.notes.get("search")
    if known is None:
        known = _search(plan, workers, store.folder)
        store.note("search", known)
    return known["beta"], known["tried"]


def _search(plan: PruningPlan, workers: Workers, folder: Path) -> dict[str, Any]:
    options = plan.options
    assert options.max_loss_increase is not None  # noqa: S101 (that is what is searched by)
    tried: list[Trial] = []
    with plan.source.files(plan.checkpoint.shards) as files, recording():
        session = Session(plan, workers.progress, files, folder)

        def tell(beta: float | None, loss: float) -> float:
            tried.append({"beta": beta, "loss": digits(loss), "perplexity": _perplexity(loss)})
            return loss

        def measure(beta: float) -> float:
            with (
                TemporaryDirectory(dir=folder) as scratch,
                MaskStore(Path(scratch) / "tried") as decisions,
            ):
                calibration = Calibration(plan.with_beta(beta), workers, files, session)
                calibration.decide(decisions)
                session.begin(f"measuring β = {beta:g}")
                return tell(beta, session.loss(calibration.changed(decisions)))

        session.begin("measuring the dense model")
        dense = tell(None, session.loss(unchanged))
        beta = bisect_beta(measure, dense * (1 + options.max_loss_increase / 100))
    return {"beta": beta, "tried": tried}


def bisect_beta(measure: Callable[[float], float], most: float) -> float:
    """The least β whose loss is good enough, of those that are tried.

    From 1 on, β is halved while that is good enough, or doubled while it is not; then the interval
    between the two is halved until it is 2 % wide.

    Args:
        measure: The loss at a β; it falls as β rises.
        most: The loss that is good enough.

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
        # to 3 digits, which lie closer together than the interval is wide
        middle = round(middle, max(3, 2 - math.floor(math.log10(middle))))
        if measure(middle) <= most:
            high = middle
        else:
            low = middle
    return high


def _perplexity(loss: float) -> float:
    return digits(math.exp(min(loss, _LONGEST)))
