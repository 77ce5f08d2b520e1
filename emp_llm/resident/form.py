"""How packed rows make up a tensor: which rows of which planes, in which shape.

A tensor is matrices of rows, as in `emp_llm.tensors.geometry`. What selects, splits or joins whole
rows changes only its form; no weight is decoded.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

__all__ = ["Form", "Stretch", "joined"]


@dataclass(frozen=True)
class Stretch:
    """Rows first to stop of some planes.

    Attributes:
        planes: The number of the planes, among those of the tensor.
        first: The first row, numbered through all matrices of the packed tensor.
        stop: The row behind the last one.
    """

    planes: int
    first: int
    stop: int


@dataclass(frozen=True)
class Form:
    """A tensor made of packed rows.

    Attributes:
        shape: Two dimensions or more.
        transposed: Whether rows run along the last dimension but one.
        stretches: Its rows, in order through all its matrices.
        turned: Whether the dense tensor is seen with its last two dimensions exchanged, so that
            the last one is not contiguous.
    """

    shape: tuple[int, ...]
    transposed: bool
    stretches: tuple[Stretch, ...]
    turned: bool = False

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The dimensions that count rows: those of the matrices, then a matrix's rows."""
        return *self.shape[:-2], self.shape[-1 if self.transposed else -2]

    @property
    def columns(self) -> int:
        """Weights in a row."""
        return self.shape[-2 if self.transposed else -1]

    @property
    def rows(self) -> int:
        """Rows of all matrices."""
        return math.prod(self.row_shape)

    def axis(self, dim: int) -> int | None:
        """The place of a dimension in `row_shape`; None if it is the one that counts columns."""
        dim %= len(self.shape)
        last = len(self.shape) - 2
        if dim < last:
            return dim
        return last if (dim == last) != self.transposed else None

    def exchanged(self) -> Self:
        """The same with the last two dimensions exchanged."""
        *matrices, lines, width = self.shape
        return replace(
            self,
            shape=(*matrices, width, lines),
            transposed=not self.transposed,
            turned=not self.turned,
        )

    @property
    def strides(self) -> tuple[int, ...]:
        """The strides of the dense tensor."""
        *matrices, lines, width = self.shape
        inner = (1, lines) if self.turned else (width, 1)
        strides = [lines * width]
        for length in matrices[:0:-1]:
            strides.insert(0, strides[0] * length)
        return (*strides, *inner) if matrices else inner

    def taken(self, dim: int, places: Sequence[int]) -> Self | None:
        """What lies at some places of a dimension; None if it does not consist of whole rows."""
        axis = self.axis(dim)
        if axis is None:
            return None
        shape = list(self.shape)
        shape[dim % len(shape)] = len(places)
        length, inner = self.row_shape[axis], math.prod(self.row_shape[axis + 1 :])
        stretches: list[Stretch] = []
        for outer in range(math.prod(self.row_shape[:axis])):
            for start, stop in _runs(places):
                first = outer * length
                self.append_rows((first + start) * inner, (first + stop) * inner, stretches)
        return replace(self, shape=tuple(shape), stretches=tuple(stretches))

    def reshaped(self, shape: Sequence[int]) -> Self | None:
        """The same rows in another shape; None if its rows would be others."""
        if len(shape) < 2 or math.prod(shape) != math.prod(self.shape):
            return None
        kept = 2 if self.transposed else 1
        if tuple(shape[-kept:]) != self.shape[-kept:]:
            return None
        return replace(self, shape=tuple(shape))

    def matrix(self, number: int) -> Self:
        """One of the matrices, in two dimensions."""
        rows = self.row_shape[-1]
        stretches: list[Stretch] = []
        self.append_rows(number * rows, (number + 1) * rows, stretches)
        return replace(self, shape=self.shape[-2:], stretches=tuple(stretches))

    def some_rows(self, first: int, stop: int) -> list[tuple[int, Stretch]]:
        """Some rows: each stretch of them with the number of its first row, from `first` on."""
        found: list[Stretch] = []
        self.append_rows(first, stop, found)
        at, result = 0, []
        for stretch in found:
            result.append((at, stretch))
            at += stretch.stop - stretch.first
        return result

    def append_rows(self, first: int, stop: int, stretches: list[Stretch]) -> None:
        """Add rows to stretches; those that follow on one another become one."""
        at = 0
        for stretch in self.stretches:
            begin, end = max(first, at), min(stop, at + stretch.stop - stretch.first)
            if begin < end:
                shift = stretch.first - at
                _add(Stretch(stretch.planes, begin + shift, end + shift), stretches)
            at += stretch.stop - stretch.first


def joined(forms: Sequence[Form], dim: int) -> Form | None:
    """Tensors one after the other along a dimension; None if that breaks their rows.

    Args:
        forms: Their stretches number the planes of all of them.
        dim: The dimension.
    """
    first = forms[0]
    axis = first.axis(dim)
    if axis is None or any(form.transposed != first.transposed for form in forms):
        return None
    stretches: list[Stretch] = []
    for outer in range(math.prod(first.row_shape[:axis])):
        for form in forms:
            rows = math.prod(form.row_shape[axis:])
            form.append_rows(outer * rows, (outer + 1) * rows, stretches)
    shape = list(first.shape)
    shape[dim] = sum(form.shape[dim] for form in forms)
    return replace(first, shape=tuple(shape), stretches=tuple(stretches))


def _add(stretch: Stretch, stretches: list[Stretch]) -> None:
    if stretches and (stretches[-1].planes, stretches[-1].stop) == (stretch.planes, stretch.first):
        stretch = replace(stretch, first=stretches.pop().first)
    stretches.append(stretch)


def _runs(places: Sequence[int]) -> list[tuple[int, int]]:
    """The places as runs that follow on one another: first and behind the last."""
    if isinstance(places, range) and places.step == 1:
        return [(places.start, places.stop)]
    runs: list[tuple[int, int]] = []
    for place in places:
        if runs and runs[-1][1] == place:
            runs[-1] = runs[-1][0], place + 1
        else:
            runs.append((place, place + 1))
    return runs
