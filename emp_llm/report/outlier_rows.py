"""Rows of weights that are unlike the others: dead, nearly uniform, or dominated by few weights.

Thresholds are on the two statistics that the rule computes for a row, N_eff / N and Σ|w|. Gaussian
weights have N_eff / N = 2/π = 0.64, Laplacian ones 0.5, and ones spread evenly over an interval
around 0 have 0.75.
"""

import heapq
import math
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from emp_llm.report.fields import OutlierRow
from emp_llm.report.tensor_statistics import digits, effective_numbers

__all__ = ["DOMINATED", "LISTED", "NEARLY_DEAD", "UNIFORM", "StandingOut"]

LISTED = 100
"""Rows that are listed, at most."""

NEARLY_DEAD = 0.1
"""A row is nearly dead if its Σ|w| is below this fraction of the median of its tensor's rows."""

UNIFORM = 0.9
"""A row is nearly uniform if its N_eff / N is above this: the standard deviation of its magnitudes
is then below a third of their mean."""

DOMINATED = 0.1
"""A row is dominated by few weights if its N_eff / N is below this: at β = 1 under 10 % stay."""

_SMALLEST_ROW = 16
"""Shorter rows reach the thresholds on N_eff / N by chance."""


@dataclass(frozen=True, order=True)
class _Row:
    distance: float
    tensor: str = field(compare=False)
    row: int = field(compare=False)
    why: str = field(compare=False)
    n_eff_fraction: float = field(compare=False)
    mass_ratio: float = field(compare=False)


class StandingOut:
    """Rows that stand out: all of them counted, the worst listed."""

    def __init__(self) -> None:
        self._worst: list[_Row] = []
        self._counts = {"dead": 0, "nearly dead": 0, "dominated by few": 0, "nearly uniform": 0}

    def look(self, tensor: str, columns: int, stats: npt.NDArray[np.float64]) -> None:
        """Look at the rows of a tensor.

        Args:
            tensor: Its name.
            columns: Weights in a row, N.
            stats: float64 [R, 2 or more], Σ|w| and Σw² of each row.
        """
        mass = stats[:, 0]
        fraction = effective_numbers(mass, stats[:, 1]) / columns
        alive = mass > 0
        usual = float(np.median(mass[alive])) if alive.any() else 1.0
        share = mass / usual
        with np.errstate(divide="ignore"):
            # how far a row is past each threshold, as a ratio; the first one passed is the reason
            distances = {
                "dead": np.where(alive, 0.0, math.inf),
                "nearly dead": np.where(alive, NEARLY_DEAD / share, 0.0),
                "dominated by few": DOMINATED / fraction,
                "nearly uniform": (1 - UNIFORM) / np.maximum(1 - fraction, 1e-6),
            }
        seen = np.zeros(len(mass), np.bool_)
        for why, distance in distances.items():
            by_chance = columns < _SMALLEST_ROW and "dead" not in why
            found = np.zeros_like(seen) if by_chance else (distance > 1) & ~seen
            seen |= found
            self._counts[why] += int(found.sum())
            rows = np.flatnonzero(found)
            # no more than can be listed, or a dead model would fill the memory
            for r in rows[np.argsort(-distance[rows], kind="stable")][:LISTED].tolist():
                self._worst.append(
                    _Row(
                        -float(distance[r]),
                        tensor,
                        r,
                        why,
                        digits(float(fraction[r])),
                        digits(float(share[r])),
                    )
                )
        self._worst = heapq.nsmallest(LISTED, self._worst)

    @property
    def worst(self) -> list[OutlierRow]:
        """At most `LISTED` rows, worst first."""
        return [
            {
                "tensor": row.tensor,
                "row": row.row,
                "why": row.why,
                "n_eff_fraction": row.n_eff_fraction,
                "mass_ratio": row.mass_ratio,
            }
            for row in self._worst
        ]

    @property
    def counts(self) -> dict[str, int]:
        """How many rows there are, listed or not, by what is unusual about them."""
        return dict(self._counts)
