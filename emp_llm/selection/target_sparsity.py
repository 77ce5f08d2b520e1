"""The one β whose total sparsity is the one that was asked for, without pruning many times.

What all groups keep together,

    kept(β) = Σ min(N, max(1, floor(β · N_eff · (1 + 1e-9))))      0 for a group of zeros,

is a step function of β. Float64 narrows down where it takes the steps to and from the number of
weights that is wanted; the few groups that take them there are summed up exactly. So the interval
of β is exact, the same on every machine, and the shortest decimal number in it is the answer.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Collection
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple

from emp_kernels.dispatch import count_rows
from emp_kernels.histogram import BlockHistogram, MagnitudeHistogram
from emp_kernels.rows import Patterns, RowCounts, Workspace

from emp_llm.errors import OptionError
from emp_llm.options import Granularity, PruneOptions
from emp_llm.runtime.team import Team
from emp_llm.selection.block_pass import BlockPass
from emp_llm.selection.group_numbers import GroupNumbers
from emp_llm.tensors.geometry import RowBlock
from emp_llm.tensors.target import Target

__all__ = ["beta_for_sparsity", "find_beta", "measure_groups", "shortest_decimal"]

_FEW = 64
"""Steps that are worked out exactly; each may read a row again."""


def find_beta(
    targets: Collection[Target],
    options: PruneOptions,
    block_pass: BlockPass,
    *,
    weights: int | None = None,
    team: Team | None = None,
    scratch: Path | None = None,
) -> float:
    """The β at which `options.target_sparsity` of all weights is pruned, in one pass over targets.

    Args:
        targets: The targets that this rank reads; or scores, as float32 targets of files of scores.
        options: The target sparsity, and what a group is.
        block_pass: How they are read.
        weights: How many weights all targets have, on all ranks together; if it is only this one,
            it need not be told.
        team: The ranks; all of them get the same β.
        scratch: A folder for what does not fit into memory; None for the usual one.

    Raises:
        CheckpointError: If a target cannot be read or holds NaN or infinity.
        OptionError: If no β prunes as much, or as little.
    """
    assert options.target_sparsity is not None  # noqa: S101 (it is what is asked for)
    team = team or Team()
    if weights is None:
        weights = sum(math.prod(target.entry.shape) for target in targets)
    with GroupNumbers(scratch) as groups:
        measure_groups(groups, targets, options.granularity, block_pass, team)
        threads = block_pass.threads
        return beta_for_sparsity(
            groups, weights, options.target_sparsity, threads=threads, team=team
        )


def measure_groups(
    groups: GroupNumbers,
    targets: Collection[Target],
    granularity: Granularity,
    block_pass: BlockPass,
    team: Team,
) -> None:
    """Find the effective numbers of the magnitudes of all groups, in one pass over the weights.

    Args:
        groups: Where to; it reads rows again as long as the files are open.
        targets: The targets that this rank reads.
        granularity: What a group is.
        block_pass: How they are read.
        team: The ranks; one group of all targets is known to the first one.

    Raises:
        CheckpointError: If a target cannot be read or holds NaN or infinity.
    """
    if granularity == "row":
        _measure_rows(groups, targets, block_pass)
        return
    together = granularity == "model"
    histogram = MagnitudeHistogram()

    def gather(target: Target, block: RowBlock, counted: BlockHistogram) -> None:
        nonlocal histogram
        histogram.add(counted)
        if not together and block.stop == target.geometry.matrix_rows:
            groups.add_group(histogram.size, histogram.sums())
            histogram = MagnitudeHistogram()

    block_pass.run(
        targets, lambda t, _, w, space: BlockHistogram(w, t.geometry.number_format, space), gather
    )
    if together:
        everything = MagnitudeHistogram()
        for part in team.gather(histogram.to_dict()):
            everything.merge(part)
        if team.leads:
            groups.add_group(everything.size, everything.sums())


def _measure_rows(groups: GroupNumbers, targets: Collection[Target], block_pass: BlockPass) -> None:
    begun: set[str] = set()

    def gather(target: Target, _block: RowBlock, counted: RowCounts) -> None:
        if target.name not in begun:
            begun.add(target.name)
            read = partial(_read_row, target, block_pass)
            groups.begin_rows(target.geometry.columns, target.geometry.number_format, read)
        groups.add_rows(counted.stats)

    block_pass.run(
        targets, lambda t, _b, w, _s: count_rows(w, t.geometry.number_format, ()), gather
    )


def _read_row(target: Target, block_pass: BlockPass, row: int) -> Patterns:
    matrix, start = divmod(row, target.geometry.matrix_rows)
    file = block_pass.files.file(target.shard)
    return target.read(file, RowBlock(matrix, start, start + 1), Workspace())


def beta_for_sparsity(
    groups: GroupNumbers, weights: int, target_sparsity: float, *, threads: int, team: Team
) -> float:
    """The β at which a share of all weights is pruned.

    Of all β that leave round((1 − target_sparsity) · weights) weights it is the one with fewest
    decimal digits, and of those with as few the least. Where groups take steps together and no β
    leaves just that many, it is one that comes nearest, with less left between two as near.

    Args:
        groups: All groups; of several ranks, this one's part of them.
        weights: How many weights there are, on all ranks together.
        target_sparsity: Between 0 and 1.
        threads: Threads that count.
        team: The ranks; all of them get the same β.

    Raises:
        OptionError: If no β prunes as much, or as little.
    """
    search = _Search(groups, threads, team)
    wanted = round((1 - Fraction(repr(float(target_sparsity)))) * weights)
    if not search.least <= wanted <= search.most:
        sparsest, densest = (1 - kept / weights if weights else 0.0 for kept in search.reach)
        raise OptionError(
            f"target_sparsity is {target_sparsity:g}; of these targets a share of {densest:.6g} to "
            f"{sparsest:.6g} can be pruned, for zeros stay zeros and each group keeps one weight"
        )
    return search.beta(wanted)


class _Step(NamedTuple):
    """Where the number of weights that are kept grows.

    Attributes:
        beta: The least β at which it is larger; None if it never is.
        before: The number below.
        after: The number from there on.
    """

    beta: Fraction | None
    before: int
    after: int


class _Search:
    """The search for a β, with what is known already of the step function.

    Attributes:
        least: Weights that are kept at any β.
        most: Weights that are kept at the largest.
    """

    def __init__(self, groups: GroupNumbers, threads: int, team: Team) -> None:
        self._groups = groups
        self._threads = threads
        self._team = team
        ends = team.gather(
            [groups.least, groups.most, groups.first_step, groups.last_step, groups.doubt]
        )
        least, most, first, last, doubt = zip(*ends, strict=True)
        self.least, self.most = sum(least), sum(most)
        self._doubt = max(doubt)
        # half and twice, so that no rounding matters
        self._known = {min(first) / 2: self.least, max(last) * 2: self.most}

    @property
    def reach(self) -> tuple[int, int]:
        """The fewest and the most weights that can be kept."""
        return self.least, self.most

    def beta(self, wanted: int) -> float:
        """The β that keeps so many weights, from `least` to `most`, or the nearest."""
        low = self._step_to(wanted)
        total = wanted
        if low.after != wanted:  # groups step over it together
            total = low.before if wanted - low.before <= low.after - wanted else low.after
            low = self._step_to(total)
        assert low.beta is not None  # noqa: S101 (so many can be kept)
        return shortest_decimal(low.beta, self._step_to(total + 1).beta)

    def _step_to(self, kept: int) -> _Step:
        """The step by which at least so many weights are kept."""
        if kept <= self.least:
            return _Step(Fraction(0), 0, self.least)
        if kept > self.most:
            return _Step(None, self.most, self.most)
        low, high = self._bracket(kept)
        # float64 may have counted a step that lies this far off
        low, high = low * (1 - 4 * self._doubt), high * (1 + 4 * self._doubt)
        part = self._groups.steps(low, high)
        pairs = [(beta.numerator, beta.denominator) for beta in part.betas]
        gathered = self._team.gather((part.base, pairs))
        base = sum(found for found, _ in gathered)
        betas = sorted(Fraction(*pair) for _, pairs in gathered for pair in pairs)
        beta = betas[kept - base - 1]
        assert low < beta <= high  # noqa: S101 (fewer are kept below, as many from there on)
        before = base + bisect_left(betas, beta)
        return _Step(beta, before, base + bisect_right(betas, beta))

    def _bracket(self, kept: int) -> tuple[float, float]:
        """Two β, at the first of which fewer weights are kept, at the second as many or more."""
        while True:
            low = max(beta for beta, count in self._known.items() if count < kept)
            high = min(beta for beta, count in self._known.items() if count >= kept)
            points = self._points(low, high, kept)
            if not points:
                return low, high
            counted = self._team.gather(self._groups.counts(points, threads=self._threads))
            totals = [sum(parts) for parts in zip(*counted, strict=True)]
            self._known |= dict(zip(points, totals, strict=True))

    def _points(self, low: float, high: float, kept: int) -> list[float]:
        """Where to count next; nowhere if few steps are left, or float64 cannot tell them apart."""
        below, reached = self._known[low], self._known[high]
        if reached - below <= _FEW or high - low <= 16 * self._doubt * high:
            return []
        if high > 2 * low:
            return [low * (high / low) ** (i / 16) for i in range(1, 16)]
        width = high - low
        guess = low + width * (kept - below) / (reached - below)
        near = (guess + side * width / 8**power for power in range(2, 7) for side in (-1, 1))
        evenly = (low + width * i / 6 for i in range(1, 6))
        return sorted({point for point in (*near, guess, *evenly) if low < point < high})


def shortest_decimal(low: Fraction, high: Fraction | None) -> float:
    """The number with fewest significant digits that is at least `low` and less than `high`.

    Args:
        low: Not negative; 0 stands for a number that is not too far below `high`.
        high: More than `low`; None for infinity.

    Returns:
        The least of those with as few digits, as float64, which lies in the interval too; where no
        number of float64 does, the first above it.
    """
    if not low:
        low = Fraction(1) if high is None else high / 2
    first = math.floor(math.log10(low))
    for digits in range(1, 18):
        unit = Fraction(10) ** (first + 1 - digits)
        # float64 may round the first of them to below the interval
        for number in range(math.ceil(low / unit), math.ceil(low / unit) + 2):
            value = float(number * unit)
            if low <= Fraction(value) and (high is None or value < high):
                return value
    nearest = float(low)
    return nearest if nearest >= low else math.nextafter(nearest, math.inf)
