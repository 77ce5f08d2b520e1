"""Exact histograms of the magnitudes in a group larger than a row, and the threshold they give.

All formats are counted in one order, that of float32's keys: the magnitude of every bf16 and fp16
weight is a float32 exactly, so its key there says where it ranks among weights of other formats.
16-bit weights are counted key by key. float32 has too many keys for that, so a first pass counts by
bin (upper 15 bits), and a second one the low parts (lower 16 bits) of the bin that holds the k-th
largest. Histograms of row blocks add up as integers, so neither the order nor the number of threads
or machines matters.
"""

from collections.abc import Mapping
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from emp_kernels.counting import exact_sums
from emp_kernels.dispatch import Impl, get_backend
from emp_kernels.errors import NonFiniteRowError
from emp_kernels.numbers import BINS, F32, FORMATS, LOW_PARTS, NumberFormat
from emp_kernels.rows import Counts, Patterns, Workspace

__all__ = [
    "BlockHistogram",
    "MagnitudeHistogram",
    "count_equal",
    "count_low_parts",
    "native_threshold",
    "sparse",
]


class BlockHistogram:
    """What one row block adds to a `MagnitudeHistogram`.

    Args:
        weights: uint16 or uint32 [R, C], bit patterns, C-contiguous, fewer than 2**31.
        number_format: Their format.
        workspace: Buffers to use again; with a GPU, weights are counted there.
        impl: Backend, as in `emp_kernels.dispatch`; "simd" is no other than "scalar" here.

    Raises:
        NonFiniteRowError: If a weight is NaN or infinite.
        NoDeviceError: If "triton" was asked for, and there is no GPU.

    Attributes:
        counts: int64 [BINS], by key for 16-bit formats, by bin for float32.
        low_sums: uint64 [BINS], float32 only: sums of the low parts.
        low_squares: uint64 [BINS], float32 only: sums of their squares.
    """

    def __init__(
        self,
        weights: Patterns,
        number_format: NumberFormat,
        workspace: Workspace | None = None,
        impl: Impl = "auto",
    ) -> None:
        self.number_format = number_format
        found = get_backend(impl, workspace).count_magnitudes(weights, number_format)
        self.counts = found.counts
        self.low_sums = found.low_sums
        self.low_squares = found.low_squares
        if self.counts[number_format.infinity >> (number_format.bits - 16) :].any():
            keys = weights & number_format.storage.type(number_format.key_mask)
            bad = keys >= number_format.infinity
            raise NonFiniteRowError(int(np.flatnonzero(bad.any(axis=1))[0]))


class MagnitudeHistogram:
    """The magnitudes of one group of weights, of one format or several."""

    def __init__(self) -> None:
        self._keys: dict[NumberFormat, Counts] = {}
        self._bins = np.zeros(BINS, np.int64)
        self._low_sums = np.zeros(BINS, np.uint64)
        # sums of squares over many row blocks pass 64 bits: their halves are summed apart
        self._low_squares = np.zeros((2, BINS), np.uint64)

    def add(self, block: BlockHistogram) -> None:
        """Count one more row block."""
        if block.number_format is not F32:
            keys = self._keys.setdefault(block.number_format, np.zeros(BINS, np.int64))
            keys += block.counts
            return
        self._bins += block.counts
        self._low_sums += block.low_sums
        self._low_squares[0] += block.low_squares & np.uint64(0xFFFFFFFF)
        self._low_squares[1] += block.low_squares >> np.uint64(32)

    def merge(self, other: Mapping[str, Any]) -> None:
        """Count what another histogram counted too, as its `to_dict` returned it."""
        for name, keys in other["keys"].items():
            own = self._keys.setdefault(FORMATS[name], np.zeros(BINS, np.int64))
            _add_sparse(own, keys)
        _add_sparse(self._bins, other["bins"])
        _add_sparse(self._low_sums, other["low_sums"])
        for half, squares in zip(self._low_squares, other["low_squares"], strict=True):
            _add_sparse(half, squares)

    def to_dict(self) -> dict[str, Any]:
        """The histogram as JSON can hold it, exactly."""
        return {
            "keys": {fmt.name: sparse(keys) for fmt, keys in self._keys.items()},
            "bins": sparse(self._bins),
            "low_sums": sparse(self._low_sums),
            "low_squares": [sparse(half) for half in self._low_squares],
        }

    @property
    def size(self) -> int:
        """Weights counted."""
        return int(self._bins.sum()) + sum(int(keys.sum()) for keys in self._keys.values())

    def sums(self) -> tuple[Fraction, Fraction]:
        """Σ|w| and Σw², exactly."""
        parts = []
        for number_format, keys in self._keys.items():
            for key in np.flatnonzero(keys).tolist():
                m, e = number_format.significand(key)
                count = int(keys[key])
                parts.append((e, count * m, count * m * m))
        for index in np.flatnonzero(self._bins).tolist():
            m, e = F32.significand(index << 16)
            count, low = int(self._bins[index]), int(self._low_sums[index])
            squares = int(self._low_squares[0, index]) + (int(self._low_squares[1, index]) << 32)
            parts.append((e, count * m + low, count * m * m + 2 * m * low + squares))
        return exact_sums(parts)

    def find_bin(self, k: int) -> tuple[int, int]:
        """The bin that holds the k-th largest magnitude, and its rank within, both from the top.

        Args:
            k: From 1 to `size`.
        """
        by_bin = self._bins.copy()
        for number_format, keys in self._keys.items():
            np.add.at(by_bin, _float32_keys(number_format) >> 16, keys)
        from_top = np.cumsum(by_bin[::-1])
        index = int(np.searchsorted(from_top, k))
        found = BINS - 1 - index
        return found, k - int(from_top[index] - by_bin[found])

    def low_parts(self, chosen_bin: int) -> tuple[Counts, bool]:
        """Low parts in a bin of the weights whose low parts are known: int64 [LOW_PARTS].

        Returns:
            The counts, and whether float32 weights of the bin are still to be added to them.
        """
        counts = np.zeros(LOW_PARTS, np.int64)
        for number_format, keys in self._keys.items():
            float_keys = _float32_keys(number_format)
            inside = float_keys >> 16 == chosen_bin
            np.add.at(counts, float_keys[inside] & 0xFFFF, keys[inside])
        return counts, bool(self._bins[chosen_bin])


def sparse(counts: npt.NDArray[Any]) -> tuple[list[int], list[int]]:
    """Indices and values of the counts that are not zero."""
    indices = np.flatnonzero(counts)
    return indices.tolist(), counts[indices].tolist()


def _add_sparse(counts: npt.NDArray[Any], added: tuple[list[int], list[int]]) -> None:
    indices, values = added
    counts[indices] += np.array(values, counts.dtype)


@cache
def _float32_keys(number_format: NumberFormat) -> Counts:
    """The key in float32 of every key of a 16-bit format, int64 [BINS]; past infinity: its own."""
    keys = np.arange(BINS, dtype=np.uint16)
    magnitudes = number_format.magnitudes(np.minimum(keys, number_format.infinity))
    return magnitudes.astype(np.float32).view(np.uint32).astype(np.int64)


def count_low_parts(
    weights: Patterns,
    chosen_bin: int,
    workspace: Workspace | None = None,
    impl: Impl = "auto",
) -> Counts:
    """Low parts of the float32 weights (uint32 [R, C]) in a bin, int64 [LOW_PARTS].

    Where they are counted is chosen as for `BlockHistogram`.
    """
    return get_backend(impl, workspace).count_low_parts(weights, chosen_bin)


def count_equal(
    weights: Patterns,
    number_format: NumberFormat,
    key: int,
    workspace: Workspace | None = None,
    impl: Impl = "auto",
) -> int:
    """How many weights (uint16 or uint32 [R, C]) have this key.

    Where they are counted is chosen as for `BlockHistogram`.
    """
    return get_backend(impl, workspace).count_equal(weights, number_format, key)


def native_threshold(number_format: NumberFormat, float32_key: int) -> tuple[int, bool]:
    """A threshold in another format: its largest key that does not exceed a float32 key.

    Returns:
        The key, and whether it stands for the very same magnitude.
    """
    if number_format is F32:
        return float32_key, True
    keys = _float32_keys(number_format)[: number_format.infinity]
    key = int(np.searchsorted(keys, float32_key, side="right")) - 1
    return key, int(keys[key]) == float32_key
