"""How many weights each group keeps, so that all of them together keep a given number.

Shapes in names: G groups.
"""

import numpy as np
import numpy.typing as npt

__all__ = ["Counts", "Floats", "apportion", "spread"]

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def spread(total: int, sizes_G: Counts) -> Counts:
    """The same share of every group, to the last weight.

    Group g gets total · size_g / Σ size, rounded up or down so that the groups up to any one hold
    their exact share together, rounded down. So what rounding leaves over is spread evenly.

    Args:
        total: How many weights all groups keep, from 0 to Σ size.
        sizes_G: Weights in each group, int64 [G].

    Returns:
        int64 [G], from 0 to the group's size, summing up to `total`.

    >>> spread(5, np.array([4, 4, 4]))
    array([1, 2, 2])
    """
    ends = np.cumsum(sizes_G).tolist()
    # Python's integers: total times the weights of a large model passes 2**63
    up_to_G = np.array([total * end // ends[-1] for end in ends], np.int64)
    up_to_G[1:] -= up_to_G[:-1].copy()
    return up_to_G


def apportion(total: int, shares_G: Floats, sizes_G: Counts) -> Counts:
    """Counts in proportion to given shares, as far as the groups' sizes allow.

    Group g gets c · share_g, but at least 1 and at most its size, and nothing where its share is 0;
    c is the one factor for which that sums up to `total`. The counts are rounded down, and the
    groups that lose most by it get one more, the first ones between equal losses.

    Args:
        total: How many weights all groups keep.
        shares_G: float64 [G], finite and not negative.
        sizes_G: Weights in each group, int64 [G].

    Returns:
        int64 [G], summing up to `total`.

    Raises:
        ValueError: If groups with a share cannot keep that many, or that few.

    >>> apportion(7, np.array([1.0, 2.0, 6.0]), np.array([4, 4, 4]))
    array([1, 2, 4])
    """
    live_G = shares_G > 0
    most = int(sizes_G[live_G].sum())
    if not np.count_nonzero(live_G) <= total <= most:
        raise ValueError(f"{np.count_nonzero(live_G)} to {most} weights can be kept, not {total}")

    def quotas(factor: float) -> Floats:
        return np.where(live_G, np.clip(factor * shares_G, 1, sizes_G), 0)

    low, high = 0.0, float((sizes_G[live_G] / shares_G[live_G]).max(initial=0.0)) * 2
    while low < (middle := (low + high) / 2) < high:
        if quotas(middle).sum() <= total:
            low = middle
        else:
            high = middle
    quotas_G = quotas(low)
    counts_G = np.floor(quotas_G).astype(np.int64)
    left = total - int(counts_G.sum())
    # a float sum may miss an integer by a little, so that a full group is not to be given more
    losses_G = np.where(counts_G < sizes_G, quotas_G - counts_G, -1)
    counts_G[np.argsort(-losses_G, kind="stable")[:left]] += 1
    return counts_G
