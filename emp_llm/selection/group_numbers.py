"""Effective numbers of groups, as many as a checkpoint has, and what they keep at every β.

Legend: G groups, B values of β; q is the effective number N_eff of a group, N its size.
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from emp_kernels.counting import SLACK, doubt, exact_sums_of, first_beta
from emp_kernels.numbers import NumberFormat
from emp_kernels.rows import Patterns, Workspace

from emp_llm.report.tensor_statistics import effective_numbers
from emp_llm.runtime.pipeline import Piece, run_pieces

__all__ = ["GroupNumbers", "Steps"]

Floats = npt.NDArray[np.float64]
Sums = tuple[Fraction, Fraction]

_IN_MEMORY = 64 << 20
"""Bytes of effective numbers that are held in memory, at 8 a group."""

_AT_A_TIME = 1 << 15
"""Groups that are counted at a time: they stay in the CPU's cache."""

_EXACT = 16 * 2.0**-53
"""How far β · N_eff can be from the exact one, relatively, where N_eff was rounded once."""


class _Part(NamedTuple):
    """Groups of one size that came one after the other.

    Attributes:
        first: Number of the first of them.
        size: Weights in each.
        doubt: How far β · N_eff can be from the exact one, relatively.
        sums: Exact Σs and Σs² of one of them, by its number among them.
    """

    first: int
    size: int
    doubt: float
    sums: Callable[[int], Sums]


class Steps(NamedTuple):
    """What groups keep from one β to another.

    Attributes:
        base: Weights that they keep at the first β or below it, without the steps.
        betas: Each β at which they keep one more, exactly, ascending; those between the first and
            the last β, and maybe some that lie just outside.
    """

    base: int
    betas: list[Fraction]


class GroupNumbers:
    """Effective numbers of groups: in memory up to a limit, then in a file without a name.

    Args:
        folder: Where that file is; None for where temporary files are. OSErrors pass.

    Attributes:
        least: Weights that are kept at any β, however small: one of each group with any mass.
        most: Weights that are kept at any β that is large enough.
        first_step: No group keeps more than one weight at a smaller β; infinity if none ever does.
        last_step: All groups keep all that they ever do from this β on; 0 if it is the same at all.
        doubt: How far any β · N_eff can be from the exact one, relatively.
    """

    def __init__(self, folder: Path | None = None) -> None:
        place = None if folder is None else os.fspath(folder)
        self._file = SpooledTemporaryFile(max_size=_IN_MEMORY, dir=place)  # noqa: SIM115
        self._parts: list[_Part] = []
        self._exact: dict[int, Sums] = {}
        self._count = 0
        self.least = self.most = 0
        self.first_step = float("inf")
        self.last_step = self.doubt = 0.0

    def __enter__(self) -> "GroupNumbers":
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def begin_rows(
        self, columns: int, number_format: NumberFormat, read: Callable[[int], Patterns]
    ) -> None:
        """The rows that `add_rows` will tell of are those of one tensor, or of one set of scores.

        Args:
            columns: Weights or scores in a row.
            number_format: What they are; scores are float32.
            read: Reads one of the rows again, by its number, as bit patterns.
        """

        def sums(row: int) -> Sums:
            return exact_sums_of(read(row), number_format)

        self._begin(_Part(self._count, columns, doubt(columns), sums))

    def add_rows(self, stats_R2: Floats) -> None:
        """The next rows' Σs and Σs², float64 [R, 2]."""
        self._add(effective_numbers(stats_R2[:, 0], stats_R2[:, 1]))

    def add_group(self, size: int, sums: Sums) -> None:
        """A group of its own, with exact Σs and Σs²."""
        s1, s2 = sums
        self._begin(_Part(self._count, size, _EXACT, lambda _number: sums))
        self._add(np.array([float(s1 * s1 / s2) if s2 else 0.0]))

    def counts(self, betas: Sequence[float], *, threads: int) -> list[int]:
        """How many weights all groups keep at some β, as float64 has it: rounding may decide some.

        Args:
            betas: Finite values of β.
            threads: Threads that count.
        """
        slack_B = np.array(betas) * SLACK
        totals = [0] * len(betas)

        def settle(counted_B: Floats) -> None:
            for b, count in enumerate(counted_B.tolist()):
                totals[b] += int(count)

        def pieces() -> Iterator[Piece]:
            for first, q_G in self._chunks():
                n_G = np.repeat(*self._by_group(first, q_G.size, lambda part: part.size))
                yield Piece(0, partial(_count, q_G, n_G, slack_B), settle)

        run_pieces(pieces(), threads=threads)
        return totals

    def steps(self, low: float, high: float) -> Steps:
        """All steps between two β, which should be few: each group is summed up exactly for them.

        Args:
            low: The first β, or less.
            high: The last β, or more.
        """
        base, betas = 0, list[Fraction]()
        for first, q_G in self._chunks():
            n_G = np.repeat(*self._by_group(first, q_G.size, lambda part: part.size))
            doubt_G = np.repeat(*self._by_group(first, q_G.size, lambda part: part.doubt))
            fewest_G = _kept(q_G * (low * SLACK) * (1 - doubt_G), n_G, q_G)
            most_G = _kept(q_G * (high * SLACK) * (1 + doubt_G), n_G, q_G)
            base += int(fewest_G.sum())
            for g in np.flatnonzero(fewest_G < most_G).tolist():
                sums = self._sums(first + g)
                ks = range(int(fewest_G[g]) + 1, int(most_G[g]) + 1)
                betas += (first_beta(k, *sums) for k in ks)
        return Steps(base, sorted(betas))

    def _begin(self, part: _Part) -> None:
        self._parts.append(part)
        self.doubt = max(self.doubt, part.doubt)

    def _add(self, q_G: Floats) -> None:
        size = self._parts[-1].size
        self._count += q_G.size
        self._file.write(q_G.tobytes())
        live_G = q_G[q_G > 0]
        self.least += live_G.size
        self.most += live_G.size * size
        if live_G.size and size > 1:
            self.first_step = min(self.first_step, 2 / (SLACK * float(live_G.max())))
            self.last_step = max(self.last_step, size / (SLACK * float(live_G.min())))

    def _chunks(self) -> Iterator[tuple[int, Floats]]:
        """The effective numbers in order, each lot with the number of its first."""
        for first in range(0, self._count, _AT_A_TIME):
            count = min(_AT_A_TIME, self._count - first)
            self._file.seek(8 * first)
            yield first, np.frombuffer(self._file.read(8 * count))

    def _by_group(
        self, first: int, count: int, of: Callable[[_Part], float]
    ) -> tuple[list[float], list[int]]:
        """What is the same for all groups of a part, and how many of some groups each concerns."""
        part = self._number_of_part(first)
        values, repeats = [], []
        while count:
            end = self._parts[part + 1].first if part + 1 < len(self._parts) else self._count
            here = min(end - first, count)
            values.append(of(self._parts[part]))
            repeats.append(here)
            first, count, part = first + here, count - here, part + 1
        return values, repeats

    def _number_of_part(self, group: int) -> int:
        return bisect_right(self._parts, group, key=lambda part: part.first) - 1

    def _sums(self, group: int) -> Sums:
        if group not in self._exact:
            part = self._parts[self._number_of_part(group)]
            self._exact[group] = part.sums(group - part.first)
        return self._exact[group]


def _kept(quota_G: Floats, n_G: Floats, q_G: Floats) -> Floats:
    """Weights that are kept of β · N_eff, as whole numbers, float64 [G]; 0 where N_eff is."""
    return np.minimum(np.maximum(np.floor(quota_G), q_G > 0), n_G)


def _count(q_G: Floats, n_G: Floats, slack_B: Floats, _workspace: Workspace) -> Floats:
    """Weights that some groups keep at each β, float64 [B]: whole numbers, below 2**53."""
    least_G = (q_G > 0).astype(np.float64)
    quota_G = np.empty_like(q_G)
    counted_B = np.empty_like(slack_B)
    for b, slack in enumerate(slack_B):
        np.multiply(q_G, slack, out=quota_G)
        np.floor(quota_G, out=quota_G)
        np.maximum(quota_G, least_G, out=quota_G)
        np.minimum(quota_G, n_G, out=quota_G)
        counted_B[b] = quota_G.sum()
    return counted_B
