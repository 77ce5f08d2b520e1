"""Statistics of a tensor, gathered row block by row block, as reports have them.

Legend: n is the effective number N_eff of a group, k the weights it keeps, N its size, G the number
of groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from emp_kernels.rows import RowStatistics

from emp_llm.report.fields import HISTOGRAM_BINS, StatisticFields

__all__ = [
    "Group",
    "GroupTally",
    "TensorStatistics",
    "effective_numbers",
    "mass_bound",
    "trimmed",
]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Group:
    """A group of weights larger than a row.

    Attributes:
        n_eff: Its effective number.
        size: Its weights, N.
        mass: Σ|w|.
    """

    n_eff: float
    size: int
    mass: float


def effective_numbers(s1: Floats, s2: Floats) -> Floats:
    """N_eff = S1² / S2 of groups, 0 where S2 is 0. Float64 [G] from float64 [G]."""
    return np.divide(s1 * s1, s2, out=np.zeros_like(s1), where=s2 > 0)


def mass_bound(n: Floats, size: npt.NDArray[np.int64]) -> Floats:
    """The share of Σs that the ⌊n⌋ largest scores of a group have at least (β = 1).

    With k = ⌊n⌋ it is the minimum, over integers j in (k, N], of

        k/j + (1 − k/j) · sqrt((1/n − 1/j) / (1 − 1/j))

    and 1 where k = N. As a function of 1/j this first rises and then falls, so its minimum lies at
    j = N or at j = k + 1.

    Args:
        n: float64 [G], effective numbers, 0 or from 1 to N.
        size: int64 [G], group sizes N.

    Returns:
        float64 [G]; 1 for groups without any mass.
    """
    # with the rule's own slack, so that k is the number of weights that it keeps
    k = np.minimum(np.floor(n * (1 + 1e-9)), size)

    def at(j: Floats) -> Floats:
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = np.maximum(1 / n - 1 / j, 0) / (1 - 1 / j)
            share = k / j + (1 - k / j) * np.sqrt(spread)
        return np.where(k < size, share, 1.0)

    least = np.minimum(at(size.astype(np.float64)), at(k + 1))
    return np.where(n > 0, np.minimum(least, 1.0), 1.0)


@dataclass(frozen=True, kw_only=True)
class TensorStatistics:
    """What pruning does to one tensor.

    Attributes:
        shape: The tensor's shape.
        rows: Its rows, over all its matrices.
        weights: Its weights.
        kept: How many of them are kept.
        n_eff_min: Smallest effective number of its groups.
        n_eff_mean: Mean effective number of its groups.
        n_eff_max: Largest effective number of its groups.
        fraction_min: Smallest N_eff / N of its groups.
        fraction_mean: Mean N_eff / N of its groups.
        fraction_max: Largest N_eff / N of its groups.
        histogram: Its groups counted by N_eff / N, in HISTOGRAM_BINS bins from 0 to 1.
        mass: Σ|w| of all its weights.
        kept_mass: Σ|w| of the kept ones.
        bound_mass: What `kept_mass` is at least, by `mass_bound`; None where that does not hold,
            as for other β than 1.
        bytes_before: Bytes of its data in the source.
        bytes_after: Bytes of its data, all planes together, in the result.
    """

    shape: tuple[int, ...]
    rows: int
    weights: int
    kept: int
    n_eff_min: float
    n_eff_mean: float
    n_eff_max: float
    fraction_min: float
    fraction_mean: float
    fraction_max: float
    histogram: tuple[int, ...]
    mass: float
    kept_mass: float
    bound_mass: float | None
    bytes_before: int
    bytes_after: int

    def to_dict(self) -> StatisticFields:
        """The fields of a report on it, ratios to six digits."""
        start, counts = trimmed(self.histogram)
        return {
            "shape": list(self.shape),
            "rows": self.rows,
            "weights": self.weights,
            "kept": self.kept,
            "sparsity": ratio(self.weights - self.kept, self.weights),
            "n_eff_min": digits(self.n_eff_min),
            "n_eff_mean": digits(self.n_eff_mean),
            "n_eff_max": digits(self.n_eff_max),
            "n_eff_fraction_min": digits(self.fraction_min),
            "n_eff_fraction_mean": digits(self.fraction_mean),
            "n_eff_fraction_max": digits(self.fraction_max),
            "n_eff_fraction_histogram_start": start,
            "n_eff_fraction_histogram": counts,
            "mass": digits(self.mass),
            "retained_mass": ratio(self.kept_mass, self.mass, empty=1.0),
            "retained_mass_bound": (
                None if self.bound_mass is None else ratio(self.bound_mass, self.mass, empty=1.0)
            ),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }


def trimmed(histogram: Sequence[int]) -> tuple[int, list[int]]:
    """Where a histogram starts, and its bins without the empty ones at its ends.

    So a report of 100,000 tensors is short enough to be read again.

    >>> trimmed([0, 0, 4, 0, 5, *[0] * 45])
    (2, [4, 0, 5])
    """
    counted = [i for i, count in enumerate(histogram) if count]
    start, stop = (counted[0], counted[-1] + 1) if counted else (0, 0)
    return start, list(histogram[start:stop])


def digits(value: float) -> float:
    """A float to six significant digits: more would depend on the order of summation."""
    return float(f"{value:.6g}")


def ratio(part: float, whole: float, *, empty: float = 0.0) -> float:
    """The ratio part / whole to six significant digits, `empty` where whole is 0."""
    return digits(part / whole) if whole else empty


def _histogram(fractions: Floats) -> npt.NDArray[np.int64]:
    """Groups counted by N_eff / N, int64 [HISTOGRAM_BINS]."""
    # as in the rule: a share that rounding leaves just below the edge of a bin counts as on it
    bins = (fractions * (HISTOGRAM_BINS * (1 + 1e-9))).astype(np.int64)
    return np.bincount(np.minimum(bins, HISTOGRAM_BINS - 1), minlength=HISTOGRAM_BINS)


class GroupTally:
    """Sums up the row blocks of one tensor; they are added in their order.

    Args:
        columns: Weights in a row.
        bounded: Whether `mass_bound` holds for what is kept.
        shared: The groups of the tensor's matrices, where they are larger than a row; None where
            each row is one.
    """

    def __init__(self, columns: int, bounded: bool, shared: Sequence[Group] | None) -> None:
        self._columns = columns
        self._bounded = bounded
        self._shared = shared
        self._rows = self._kept = 0
        self._mass = self._kept_mass = self._bound_mass = 0.0
        self._n_sum = self._n_max = 0.0
        self._n_min = np.inf
        self._histogram = np.zeros(HISTOGRAM_BINS, np.int64)

    def add(self, rows: RowStatistics) -> None:
        """Add one row block."""
        s1, s2, kept_mass = rows.stats[:, 0], rows.stats[:, 1], rows.stats[:, 2]
        self._rows += len(s1)
        self._kept += int(rows.table[:, 0].sum())
        self._mass += float(s1.sum())
        self._kept_mass += float(kept_mass.sum())
        if self._shared is None:
            n = effective_numbers(s1, s2)
            self._n_min = min(self._n_min, float(n.min()))
            self._n_max = max(self._n_max, float(n.max()))
            self._n_sum += float(n.sum())
            self._histogram += _histogram(n / self._columns)
            if self._bounded:
                sizes = np.full(len(n), self._columns, np.int64)
                self._bound_mass += float((mass_bound(n, sizes) * s1).sum())

    def statistics(
        self, shape: tuple[int, ...], bytes_before: int, bytes_after: int
    ) -> TensorStatistics:
        """The statistics of the row blocks so far.

        Args:
            shape: The tensor's shape.
            bytes_before: Bytes of its data in the source.
            bytes_after: Bytes of its data in the result.
        """
        if self._shared is None:
            n_min, n_mean, n_max = self._n_min, self._n_sum / self._rows, self._n_max
            fractions = np.array([n_min, n_mean, n_max]) / self._columns
            histogram = self._histogram
            bound = self._bound_mass if self._bounded else None
        else:
            n = np.array([group.n_eff for group in self._shared])
            sizes = np.array([group.size for group in self._shared], np.int64)
            n_min, n_mean, n_max = float(n.min()), float(n.mean()), float(n.max())
            each = n / sizes
            fractions = np.array([each.min(), each.mean(), each.max()])
            histogram = _histogram(each)
            bound = self._shared_bound(n, sizes)
        return TensorStatistics(
            shape=shape,
            rows=self._rows,
            weights=self._rows * self._columns,
            kept=self._kept,
            n_eff_min=n_min,
            n_eff_mean=n_mean,
            n_eff_max=n_max,
            fraction_min=float(fractions[0]),
            fraction_mean=float(fractions[1]),
            fraction_max=float(fractions[2]),
            histogram=tuple(histogram.tolist()),
            mass=self._mass,
            kept_mass=self._kept_mass,
            bound_mass=bound,
            bytes_before=bytes_before,
            bytes_after=bytes_after,
        )

    def _shared_bound(self, n: Floats, sizes: npt.NDArray[np.int64]) -> float | None:
        """The bound, if all groups lie within this tensor."""
        if not self._bounded or sizes.sum() != self._rows * self._columns:
            return None
        mass = np.array([group.mass for group in self._shared or ()])
        return float((mass_bound(n, sizes) * mass).sum())
