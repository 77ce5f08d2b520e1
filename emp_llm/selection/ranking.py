"""Which weights of a group a control keeps: the largest, or random ones.

Weights are ranked by keys, unsigned integers: the weights with the largest keys stay.
"""

import zlib

import numpy as np
import numpy.typing as npt
from emp_kernels.numbers import NumberFormat
from emp_kernels.rows import Patterns

__all__ = ["Keys", "keep_largest", "magnitude_keys", "random_keys"]

Bools = npt.NDArray[np.bool_]
Keys = npt.NDArray[np.unsignedinteger]


def magnitude_keys(weights: Patterns, number_format: NumberFormat) -> Keys:
    """Keys that rank finite weights, given as bit patterns, by magnitude; any shape."""
    return weights & number_format.storage.type(number_format.key_mask)


def random_keys(seed: int, name: str, group: int, size: int) -> Keys:
    """Keys that rank the weights of a group at random.

    They depend on nothing but the arguments: not on the order in which groups are ranked, and not
    on which other tensors there are.

    Args:
        seed: 0 or more.
        name: The tensor's name.
        group: The group's number in it.
        size: Weights in the group.

    Returns:
        uint32 [size], uniformly distributed.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), group])
    return rng.integers(0, 1 << 32, size, dtype=np.uint32)


def keep_largest(keys: Keys, count: int) -> Bools:
    """Which keys are the largest; between equal ones, those with the lower index.

    Args:
        keys: Unsigned integers [N].
        count: How many, from 0 to N.

    Returns:
        bool [N], true `count` times.

    >>> keep_largest(np.array([2, 7, 2, 2], np.uint16), 3)
    array([ True,  True,  True, False])
    """
    if count == 0:
        return np.zeros(keys.size, bool)
    threshold = np.partition(keys, keys.size - count)[keys.size - count]
    keep: Bools = keys > threshold
    ties = np.flatnonzero(keys == threshold)
    keep[ties[: count - np.count_nonzero(keep)]] = True
    return keep
