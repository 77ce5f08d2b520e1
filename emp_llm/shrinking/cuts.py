"""What is kept of each tensor, by the structures that stay."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from emp_llm.checkpoint.dtypes import ITEM_BITS
from emp_llm.checkpoint.header import TensorEntry
from emp_llm.shrinking.axes import Axis
from emp_llm.shrinking.choice import Choice, KindName

__all__ = ["Cut", "cut_tensor", "kept_indices", "numbered"]

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Cut:
    """A tensor that stays, all of it or a part.

    Attributes:
        entry: The tensor in the source.
        name: Its name in the result, where experts and decoder blocks are numbered anew.
        kept: The indices that stay, ascending, by dimension; all along dimensions not in it.
    """

    entry: TensorEntry
    name: str
    kept: Mapping[int, Indices]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the result."""
        return tuple(
            len(self.kept[dimension]) if dimension in self.kept else size
            for dimension, size in enumerate(self.entry.shape)
        )

    @property
    def new_entry(self) -> TensorEntry:
        """The tensor as the result has it, beginning at byte 0; not where its file has it."""
        entry, shape = self.entry, self.shape
        nbytes = math.prod(shape) * ITEM_BITS[entry.dtype] // 8
        return TensorEntry(self.name, entry.dtype, shape, 0, nbytes)


def cut_tensor(
    entry: TensorEntry, axes: Sequence[Axis], choices: Mapping[KindName, Choice]
) -> Cut | None:
    """What is kept of a tensor.

    Args:
        entry: The tensor in the source.
        axes: How it depends on structures.
        choices: Those that stay, by kind; of other kinds all stay.

    Returns:
        The cut; None if the tensor belongs to a structure that goes.
    """
    parts = entry.name.split(".")
    kept: dict[int, Indices] = {}
    for axis in axes:
        if axis.kind not in choices:
            continue
        stays = choices[axis.kind].kept[axis.holder]
        if axis.part is not None:
            stem, number = numbered(parts[axis.part])
            if number not in stays:
                return None
            parts[axis.part] = f"{stem}{stays.index(number)}"
        elif axis.dimension is not None:
            indices = kept_indices(stays, entry.shape[axis.dimension], axis.widths)
            # two kinds on one dimension: of those that the one keeps, those that the other does
            older = kept.get(axis.dimension, indices)
            kept[axis.dimension] = np.intersect1d(older, indices)
    return Cut(entry, ".".join(parts), kept)


def kept_indices(stays: Sequence[int], size: int, widths: Sequence[int]) -> Indices:
    """The indices of a dimension that belong to some of the structures in it.

    Args:
        stays: The structures' numbers, ascending.
        size: The dimension's size: a whole number of structures times the sum of `widths`.
        widths: As `emp_llm.shrinking.kind.Kind.widths` gives them.

    Two heads of three stay, each of two rows; then two neurons of three, gates before ups:

    >>> kept_indices((0, 2), 6, (2,)).tolist()
    [0, 1, 4, 5]
    >>> kept_indices((0, 2), 6, (1, 1)).tolist()
    [0, 2, 3, 5]
    """
    number = size // sum(widths)
    numbers = np.asarray(stays, np.int64)
    starts = np.cumsum([0, *(number * width for width in widths)])
    segments = [
        (start + numbers[:, None] * width + np.arange(width)).reshape(-1)
        for start, width in zip(starts, widths, strict=False)
    ]
    return np.concatenate(segments)


def numbered(part: str) -> tuple[str, int]:
    """A part of a name without the number at its end, and the number."""
    digits = re.search(r"\d+$", part)
    if digits is None:
        raise ValueError(f"{part!r} ends with no number")
    return part[: digits.start()], int(digits[0])
