"""The effective numbers of all groups of a checkpoint, and how many weights they keep at any β.

N_eff = (Σs)² / Σs² of a group's scores s; the group keeps min(N, max(1, floor(β · N_eff))) of its N
weights, 0 where N_eff is 0.

Shapes in names: G groups, B values of β. q_G holds effective numbers, n_G sizes.
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
"""Groups that are counted at a time: 256 KiB, which stay in the CPU's cache."""

_EXACT = 16 * 2.0**-53
"""Bound on the relative error of β · N_eff where N_eff is an exact number rounded once."""


class _Part(NamedTuple):
    """Consecutive groups of one size.

    Attributes:
        first: Number of the first one.
        size: Weights in each.
        doubt: Bound on the relative error of their β · N_eff.
        sums: Exact Σs and Σs² of one of them, by its number in this part.
    """

    first: int
    size: int
    doubt: float
    sums: Callable[[int], Sums]


class Steps(NamedTuple):
    """How the number of kept weights grows from one β to another.

    Attributes:
        base: Weights that are kept before the first step.
        betas: Each β at which one more is kept, exact and ascending: all between the first and the
            last β, and possibly some that lie just outside.
    """

    base: int
    betas: list[Fraction]


class GroupNumbers:
    """Effective numbers of groups: in memory up to 64 MiB, then in an unnamed temporary file.

    Args:
        folder: Where this file is; None for the system's folder of temporary files.

    Attributes:
        least: Weights that are kept at any β, however small: one of each group that is not zero.
        most: Weights that are kept at any β that is large enough.
        first_step: Below this β no group keeps more than one weight; infinity if none ever does.
        last_step: From this β on all groups keep all that they ever do; 0 if every β gives that.
        doubt: Bound on the relative error of any β · N_eff.

    Raises:
        OSError: By any method, if the file cannot be written or read.
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
        """Begin a tensor, or the scores of one, whose rows `add_rows` adds.

        Args:
            columns: Weights or scores in a row.
            number_format: Their format; scores are float32.
            read: Reads one of the rows again, by its number, as bit patterns [1, C].
        """

        def sums(row: int) -> Sums:
            return exact_sums_of(read(row), number_format)

        self._begin(_Part(self._count, columns, doubt(columns), sums))

    def add_rows(self, stats_R2: Floats) -> None:
        """Add the next rows by their Σs and Σs², float64 [R, 2]."""
        self._add(effective_numbers(stats_R2[:, 0], stats_R2[:, 1]))

    def add_group(self, size: int, sums: Sums) -> None:
        """Add one group by its exact Σs and Σs²."""
        s1, s2 = sums
        self._begin(_Part(self._count, size, _EXACT, lambda _number: sums))
        self._add(np.array([float(s1 * s1 / s2) if s2 else 0.0]))

    def counts(self, betas: Sequence[float], *, threads: int) -> list[int]:
        """How many weights all groups keep together at each β.

        Computed in float64, so where β · N_eff is within `doubt` of a whole number, the count may
        be one off.

        Args:
            betas: Finite values of β.
            threads: Threads that count.
        """
        slack_B = np.array(betas) * SLACK
        totals = [0] * len(betas)

        def add(counted_B: Floats) -> None:
            for b, count in enumerate(counted_B.tolist()):
                totals[b] += int(count)

        def pieces() -> Iterator[Piece]:
            for first, q_G in self._chunks():
                n_G = np.repeat(*self._by_group(first, q_G.size, lambda part: part.size))
                yield Piece(0, partial(_count, q_G, n_G, slack_B), add)

        run_pieces(pieces(), threads=threads)
        return totals

    def steps(self, low: float, high: float) -> Steps:
        """All steps between two β, exactly.

        They should be few: each group that takes one is read again and summed up exactly.

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
            # only these groups may take a step between the two β, or have been counted one off
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
        # a group keeps its second weight where β · N_eff reaches 2, and its last where it reaches N
        if live_G.size and size > 1:
            self.first_step = min(self.first_step, 2 / (SLACK * float(live_G.max())))
            self.last_step = max(self.last_step, size / (SLACK * float(live_G.min())))

    def _chunks(self) -> Iterator[tuple[int, Floats]]:
        """The effective numbers in order, in lots, each with the number of its first group."""
        for first in range(0, self._count, _AT_A_TIME):
            count = min(_AT_A_TIME, self._count - first)
            self._file.seek(8 * first)
            yield first, np.frombuffer(self._file.read(8 * count))

    def _by_group(
        self, first: int, count: int, of: Callable[[_Part], float]
    ) -> tuple[list[float], list[int]]:
        """Values that a part's groups share, for some groups, and how many groups have each."""
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
        # the steps of two numbers of weights are asked for, and often the same groups take them
        if group not in self._exact:
            part = self._parts[self._number_of_part(group)]
            self._exact[group] = part.sums(group - part.first)
        return self._exact[group]


def _kept(quota_G: Floats, n_G: Floats, q_G: Floats) -> Floats:
    """Weights kept for a quota β · N_eff: whole numbers in float64 [G]; 0 where N_eff is."""
    return np.minimum(np.maximum(np.floor(quota_G), q_G > 0), n_G)


def _count(q_G: Floats, n_G: Floats, slack_B: Floats, _workspace: Workspace) -> Floats:
    """Weights that some groups keep at each β: whole numbers in float64 [B], exact below 2**53."""
    least_G = (q_G > 0).astype(np.float64)
    quota_G = np.empty_like(q_G)  # one buffer for all β, which stays in cache
    counted_B = np.empty_like(slack_B)
    for b, slack in enumerate(slack_B):
        np.multiply(q_G, slack, out=quota_G)
        np.floor(quota_G, out=quota_G)
        np.maximum(quota_G, least_G, out=quota_G)
        np.minimum(quota_G, n_G, out=quota_G)
        counted_B[b] = quota_G.sum()
    return counted_B
