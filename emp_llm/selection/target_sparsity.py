"""The β that gives a target sparsity, found in one pass over the weights.

All groups together keep

    kept(β) = Σ min(N, max(1, floor(β · N_eff · (1 + 1e-9))))      0 for a group of zeros

weights, a step function of β; N_eff = (Σs)² / Σs² is the effective number of a group's scores s
(arXiv 2509.25606) and N its size. Float64 narrows down where the steps to and from the wanted
number of weights lie. The few groups that take these steps are then summed up exactly. So the
interval of β is exact and the same on every machine; the result is the shortest decimal in it.
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
from emp_llm.options import Granularity
from emp_llm.runtime.team import Team
from emp_llm.selection.group_numbers import GroupNumbers
from emp_llm.selection.group_search import HistogramScan
from emp_llm.selection.row_block_pass import RowBlockPass, RowBlockScan
from emp_llm.tensors.geometry import RowBlock
from emp_llm.tensors.target import Target

__all__ = ["beta_for_sparsity", "find_beta", "measure_groups", "shortest_decimal"]

_FEW = 64
"""The most steps that are computed exactly; each may read a row again."""


def find_beta(
    targets: Collection[Target],
    target_sparsity: float,
    granularity: Granularity,
    row_block_pass: RowBlockPass,
    *,
    weights: int | None = None,
    team: Team | None = None,
    scratch: Path | None = None,
) -> float:
    """The β at which a share of all weights is pruned, in one pass over targets.

    Args:
        targets: The targets that this rank reads; or scores, as float32 targets of files of scores.
        target_sparsity: The share of weights to prune, between 0 and 1.
        granularity: What a group is.
        row_block_pass: How the targets are read.
        weights: How many weights all targets have, on all ranks together; not needed where this is
            the only rank.
        team: The ranks; all of them get the same β.
        scratch: A folder for what does not fit into memory; None for the system's.

    Raises:
        CheckpointError: If a target cannot be read or holds NaN or infinity.
        OptionError: If no β prunes as much, or as little.
    """
    team = team or Team()
    if weights is None:
        weights = sum(math.prod(target.entry.shape) for target in targets)
    with GroupNumbers(scratch) as groups:
        measure_groups(groups, targets, granularity, row_block_pass, team)
        threads = row_block_pass.threads
        return beta_for_sparsity(groups, weights, target_sparsity, threads=threads, team=team)


def measure_groups(
    groups: GroupNumbers,
    targets: Collection[Target],
    granularity: Granularity,
    row_block_pass: RowBlockPass,
    team: Team,
) -> None:
    """Find the effective numbers of the magnitudes of all groups, in one pass over the weights.

    Args:
        groups: Takes the numbers. It reads rows again later, so the files have to stay open.
        targets: The targets that this rank reads.
        granularity: What a group is.
        row_block_pass: How the targets are read.
        team: The ranks; with granularity `model`, the first one gets the group of all targets.

    Raises:
        CheckpointError: If a target cannot be read or holds NaN or infinity.
    """
    if granularity == "row":
        row_block_pass.run(targets, _RowSums(groups, row_block_pass))
    elif granularity == "layer":
        row_block_pass.run(targets, _MatrixSums(groups))
    else:
        scan = _TotalSums()
        row_block_pass.run(targets, scan)
        everything = MagnitudeHistogram()
        for part in team.gather(scan.histogram.to_dict()):
            everything.merge(part)
        if team.leads:
            groups.add_group(everything.size, everything.sums())


class _MatrixSums(HistogramScan):
    """Each matrix is a group."""

    def __init__(self, groups: GroupNumbers) -> None:
        self._groups = groups
        self._histogram = MagnitudeHistogram()

    def gather(self, target: Target, block: RowBlock, found: BlockHistogram) -> None:
        """Add a row block's magnitudes; with the matrix's last ones, its group is known."""
        self._histogram.add(found)
        if block.stop == target.geometry.matrix_rows:
            self._groups.add_group(self._histogram.size, self._histogram.sums())
            self._histogram = MagnitudeHistogram()


class _TotalSums(HistogramScan):
    """All targets are one group.

    Attributes:
        histogram: Its magnitudes.
    """

    def __init__(self) -> None:
        self.histogram = MagnitudeHistogram()

    def gather(self, _target: Target, _block: RowBlock, found: BlockHistogram) -> None:
        """Add a row block's magnitudes."""
        self.histogram.add(found)


class _RowSums(RowBlockScan[RowCounts]):
    """Each row is a group."""

    def __init__(self, groups: GroupNumbers, row_block_pass: RowBlockPass) -> None:
        self._groups = groups
        self._pass = row_block_pass
        self._begun: set[str] = set()

    def examine(
        self, target: Target, _block: RowBlock, weights: Patterns, _workspace: Workspace
    ) -> RowCounts:
        """The sums of each row of a row block."""
        return count_rows(weights, target.geometry.number_format, ())

    def gather(self, target: Target, _block: RowBlock, found: RowCounts) -> None:
        """Add the rows of a row block."""
        if target.name not in self._begun:
            self._begun.add(target.name)
            rows, read = target.geometry, partial(_read_row, target, self._pass)
            self._groups.begin_rows(rows.columns, rows.number_format, read)
        self._groups.add_rows(found.stats)


def _read_row(target: Target, row_block_pass: RowBlockPass, row: int) -> Patterns:
    matrix, start = divmod(row, target.geometry.matrix_rows)
    file = row_block_pass.files.file(target.shard)
    return target.read(file, RowBlock(matrix, start, start + 1), Workspace())


def beta_for_sparsity(
    groups: GroupNumbers, weights: int, target_sparsity: float, *, threads: int, team: Team
) -> float:
    """The β at which a share of all weights is pruned.

    Among all β that keep round((1 − target_sparsity) · weights) weights, it is the one with the
    fewest decimal digits, and the least of those with as few. Where several groups take a step at
    the same β, so that no β keeps exactly that many, the nearest number is taken, the smaller one
    of two that are as near.

    Args:
        groups: The groups of this rank.
        weights: How many weights there are, on all ranks together.
        target_sparsity: Between 0 and 1.
        threads: Threads that count.
        team: The ranks; all of them get the same β.

    Raises:
        OptionError: If no β prunes as much, or as little.
    """
    search = _Search(groups, threads, team)
    # as the decimal number that was typed: 0.7 is not a binary fraction
    wanted = round((1 - Fraction(repr(float(target_sparsity)))) * weights)
    if not search.least <= wanted <= search.most:
        bounds = search.least, search.most
        sparsest, densest = (1 - kept / weights if weights else 0.0 for kept in bounds)
        raise OptionError(
            f"target_sparsity is {target_sparsity:g}; give {densest:.6g} to {sparsest:.6g} for "
            "these targets: zeros stay zeros, and each group keeps at least one weight"
        )
    return search.beta(wanted)


class _Step(NamedTuple):
    """A step of kept(β).

    Attributes:
        beta: Where it is.
        before: Weights that are kept at any smaller β.
        after: Weights that are kept from this β on, up to the next step.
    """

    beta: Fraction
    before: int
    after: int


class _Search:
    """The search for a β; remembers kept(β) wherever it was counted.

    Attributes:
        least: Weights that are kept at any β, however small.
        most: Weights that are kept at any β that is large enough.
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
        # half of the first step and twice the last: no rounding can reach as far
        self._known = {min(first) / 2: self.least, max(last) * 2: self.most}

    def beta(self, wanted: int) -> float:
        """The β that keeps so many weights, from `least` to `most`, or the nearest number."""
        low = self._step_to(wanted)
        total = wanted
        if low.after != wanted:  # several groups take this step: no β keeps just so many
            total = low.before if wanted - low.before <= low.after - wanted else low.after
            low = self._step_to(total)
        high = self._step_to(total + 1).beta if total < self.most else None
        return shortest_decimal(low.beta, high)

    def _step_to(self, kept: int) -> _Step:
        """The step by which at least so many weights are kept; `most` at most."""
        if kept <= self.least:
            return _Step(Fraction(0), 0, self.least)
        low, high = self._bracket(kept)
        # float64 may have counted a step that lies this far outside
        low, high = low * (1 - 4 * self._doubt), high * (1 + 4 * self._doubt)
        steps = self._groups.steps(low, high)
        pairs = [(beta.numerator, beta.denominator) for beta in steps.betas]
        gathered = self._team.gather((steps.base, pairs))
        base = sum(found for found, _ in gathered)
        betas = sorted(Fraction(*pair) for _, pairs in gathered for pair in pairs)
        # base + i weights are kept from the i-th of these steps on
        beta = betas[kept - base - 1]
        if not low < beta <= high:
            raise RuntimeError(f"the step to {kept} weights lies at β = {float(beta)}, not between")
        before = base + bisect_left(betas, beta)
        return _Step(beta, before, base + bisect_right(betas, beta))

    def _bracket(self, kept: int) -> tuple[float, float]:
        """Two β: at the first, fewer weights are kept; at the second, as many or more."""
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
        """Where to count next; nowhere if few steps are left or float64 cannot separate them.

        The effective numbers are read once for all points, so many cost little more than one.
        Evenly spaced points make the interval six times as narrow at least; those around the linear
        interpolation make it much narrower where kept(β) is nearly linear.
        """
        below, reached = self._known[low], self._known[high]
        if reached - below <= _FEW or high - low <= 16 * self._doubt * high:
            return []
        if high > 2 * low:  # still of different orders of magnitude: space them by ratio
            return [low * (high / low) ** (i / 16) for i in range(1, 16)]
        width = high - low
        guess = low + width * (kept - below) / (reached - below)
        near = (guess + side * width / 8**power for power in range(2, 7) for side in (-1, 1))
        evenly = (low + width * i / 6 for i in range(1, 6))
        return sorted({point for point in (*near, guess, *evenly) if low < point < high})


def shortest_decimal(low: Fraction, high: Fraction | None) -> float:
    """The number with the fewest significant digits that is at least `low` and less than `high`.

    Args:
        low: Not negative; 0 stands for half of `high`, or for 1 where that is None.
        high: More than `low`; None for infinity.

    Returns:
        The least of the numbers with as few digits, as a float64 inside the interval; the next
        float64 above `low` where the interval holds none.
    """
    if not low:  # any β close to 0 would do, but would be a needlessly small number
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
