"""How many weights each target keeps, where that is not one β for all of them.

`spread`   the same share of each group
`least`    the counts with the least sum of losses, from a curve for each target

Shapes in names: P points of a curve, G groups of a target.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

__all__ = ["Allocation", "Curve", "least", "spread"]

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """What targets keep, by name.

    Attributes:
        betas: The β of each target, where targets have different ones.
        kept: How many weights of each target stay, where its groups keep the same share.
    """

    betas: Mapping[str, float] = field(default_factory=dict)
    kept: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def uniform(cls, sizes: Mapping[str, int], total: int) -> "Allocation":
        """The same share of each target, so that exactly `total` weights stay.

        Args:
            sizes: The weights of each target; in the order of names, each one's number is rounded
                so that the sum of those up to it is right.
            total: How many weights of all targets stay.

        >>> Allocation.uniform({"a": 6, "b": 6, "c": 12}, 9).kept
        {'a': 2, 'b': 2, 'c': 5}
        """
        names = sorted(sizes)
        ends = np.cumsum([sizes[name] for name in names], dtype=object)
        upto = [int(end) * total // int(ends[-1]) for end in ends]
        kept = (stop - start for start, stop in zip([0, *upto], upto, strict=False))
        return cls(kept=dict(zip(names, kept, strict=True)))


def spread(total: int, groups: int) -> Counts:
    """A number of weights spread evenly over groups, int64 [G]; any two differ by one at most.

    >>> spread(7, 3)
    array([2, 2, 3])
    """
    return np.diff(np.arange(groups + 1) * total // groups)


@dataclass(frozen=True, eq=False)
class Curve:
    """The loss that pruning one target is predicted to cause.

    Attributes:
        kept: int64 [P], how many weights stay; ascending.
        loss: float64 [P], 0 or more.
    """

    kept: Counts
    loss: Floats


def least(curves: Sequence[Curve], total: int) -> list[int]:
    """How many weights each target keeps, so that the sum of losses is least.

    Each curve is taken for its lower convex hull, linear between the points. There, weights go to
    the target whose loss falls the most for each of them, until there are none left: equal slopes,
    as in rate-distortion theory (Shoham & Gersho, 1988). For these hulls the result is the least.

    Args:
        curves: One for each target.
        total: How many weights stay together, between the sums of all first and all last points.

    Returns:
        The counts; at most one of them lies between two points of its hull. They add up to `total`.

    The first target gains more from its first two weights, the second one from two further ones:

    >>> a = Curve(np.array([1, 3, 5]), np.array([9.0, 1.0, 0.0]))
    >>> b = Curve(np.array([1, 3, 5]), np.array([4.0, 2.0, 1.0]))
    >>> least([a, b], 6)
    [3, 3]
    """
    hulls = [_hull(curve) for curve in curves]
    kept = [hull[0][0] for hull in hulls]
    left = total - sum(kept)
    steps = [(_slope(hull, 0), number, 0) for number, hull in enumerate(hulls) if len(hull) > 1]
    heapq.heapify(steps)
    while left > 0 and steps:
        _, number, point = heapq.heappop(steps)
        hull = hulls[number]
        taken = min(left, hull[point + 1][0] - hull[point][0])
        kept[number] += taken
        left -= taken
        if point + 2 < len(hull):
            heapq.heappush(steps, (_slope(hull, point + 1), number, point + 1))
    return kept


def _hull(curve: Curve) -> list[tuple[int, float]]:
    """The lower convex hull of a curve (Andrew's monotone chain), counts ascending."""
    hull: list[tuple[int, float]] = []
    for kept, loss in zip(curve.kept.tolist(), curve.loss.tolist(), strict=True):
        if hull and hull[-1][0] == kept:
            loss = min(loss, hull.pop()[1])
        while len(hull) > 1 and _above(hull[-2], hull[-1], (kept, loss)):
            hull.pop()
        hull.append((kept, loss))
    return hull


def _above(a: tuple[int, float], b: tuple[int, float], c: tuple[int, float]) -> bool:
    """Whether a point lies on or above the line from the one before it to the one behind it."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def _slope(hull: Sequence[tuple[int, float]], point: int) -> float:
    (kept, loss), (more, less) = hull[point : point + 2]
    return (less - loss) / (more - kept)
