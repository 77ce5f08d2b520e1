"""The threshold of a group that is larger than a row, found in passes over its weights.

1. A histogram of all magnitudes gives N_eff, the number k of weights to keep, and the *bin* that
   holds the k-th largest magnitude: the upper 15 bits of its key, see `emp_kernels.histogram`.
2. For float32, whose keys have 31 bits, a second pass counts the *low parts* in that bin. The keys
   of 16-bit formats are known from the histogram itself.
3. Where only some of the weights that equal the threshold stay, a last pass counts them by row
   block, so that the first ones in order stay.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from emp_kernels.counting import exact_count
from emp_kernels.histogram import (
    BlockHistogram,
    MagnitudeHistogram,
    count_equal,
    count_low_parts,
    native_threshold,
    sparse,
)
from emp_kernels.numbers import F32, LOW_PARTS
from emp_kernels.rows import Patterns, Threshold, Workspace

from emp_llm.report.tensor_statistics import Group
from emp_llm.runtime.team import Team
from emp_llm.selection.row_block_pass import RowBlockPass, RowBlockScan
from emp_llm.tensors.geometry import RowBlock
from emp_llm.tensors.target import Target

__all__ = ["GroupSearch", "GroupSurvey", "GroupThreshold", "HistogramScan", "Matrix"]


Counts = npt.NDArray[np.int64]
Matrix = tuple[str, int]
"""A tensor's name and the number of a matrix in it."""


class GroupThreshold(NamedTuple):
    """What separates the weights of a group that stay from those that go.

    Attributes:
        key: Float32 key of the smallest magnitude that stays.
        kept_ties: How many of the weights of this magnitude stay.
        ties: How many weights have this magnitude.
    """

    key: int
    kept_ties: int
    ties: int


class GroupSearch:
    """The search for the threshold of one group.

    Args:
        histogram: All magnitudes of the group.
        beta: The rule's multiplier.
        kept: How many weights stay, where that is not decided by these magnitudes.

    Attributes:
        group: Effective number, size and mass of the group.
        kept: How many of its weights stay.
        bin: The bin that the threshold lies in.
    """

    def __init__(self, histogram: MagnitudeHistogram, beta: float, kept: int | None = None) -> None:
        size = histogram.size
        s1, s2 = histogram.sums()
        kept = exact_count(s1, s2, size, beta) if kept is None else kept
        self.group = Group(float(s1 * s1 / s2) if s2 else 0.0, size, float(s1))
        self.kept = kept
        # a bin is the upper 15 bits of a float32 key; infinity's is above that of every weight, for
        # a group of which nothing stays
        self.bin = F32.infinity >> 16
        self._threshold: GroupThreshold | None = None
        if not kept:
            self._threshold = GroupThreshold(F32.infinity, 0, 0)
            return
        self.bin, self._rank = histogram.find_bin(kept)
        known, incomplete = histogram.low_parts(self.bin)
        # thousands of groups are searched at once, so counts that are all zeros are not held
        self._low_parts: Counts | None = known if known.any() else None
        if not incomplete:
            self.conclude()

    @property
    def is_concluded(self) -> bool:
        """Whether the threshold is known; otherwise low parts in the bin are still to be added."""
        return self._threshold is not None

    @property
    def threshold(self) -> GroupThreshold:
        """The threshold.

        Raises:
            RuntimeError: If the search is not concluded.
        """
        if self._threshold is None:
            raise RuntimeError("low parts of float32 weights are still to be added")
        return self._threshold

    def add(self, counts: Counts) -> None:
        """Add low parts of float32 weights in the bin, int64 [LOW_PARTS]."""
        self._low_parts = counts if self._low_parts is None else self._low_parts + counts

    def conclude(self) -> None:
        """Find the threshold, now that all weights of the bin are counted."""
        counts = np.zeros(LOW_PARTS, np.int64) if self._low_parts is None else self._low_parts
        self._low_parts = None
        # from_top[i] weights have one of the i + 1 largest low parts; the threshold is the first
        # of these with which the bin's share of the kept weights is reached
        from_top = np.cumsum(counts[::-1])
        place = int(np.searchsorted(from_top, self._rank))
        low = len(from_top) - 1 - place
        ties = int(counts[low])
        above = int(from_top[place]) - ties
        self._threshold = GroupThreshold(self.bin << 16 | low, self._rank - above, ties)


class HistogramScan(RowBlockScan[BlockHistogram]):
    """Counts the magnitudes of each row block; what becomes of the counts, a subclass says."""

    def examine(
        self, target: Target, _block: RowBlock, weights: Patterns, workspace: Workspace
    ) -> BlockHistogram:
        """The magnitudes of a row block, counted."""
        return BlockHistogram(weights, target.geometry.number_format, workspace)


class GroupSurvey:
    """The passes that find the thresholds of many groups.

    Args:
        targets: The targets that this rank reads.
        group_of: The group of each matrix of them, named by the first matrix of the group.
        row_block_pass: How the targets are read.
        team: The ranks, where all targets are one group of which each rank reads a part; None where
            this process reads whole groups.

    Attributes:
        searches: The search in each group, once `count_magnitudes` has begun it.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        group_of: Mapping[Matrix, Matrix],
        row_block_pass: RowBlockPass,
        team: Team | None,
    ) -> None:
        self._targets = targets
        self._group_of = group_of
        self._pass = row_block_pass
        self._team = team
        self.searches: Mapping[Matrix, GroupSearch] = {}

    def search(self, target: Target, matrix: int) -> GroupSearch:
        """The search for the threshold of the group that a matrix belongs to."""
        return self.searches[self._group_of[target.name, matrix]]

    def count_magnitudes(self, beta: float, kept: int | None = None) -> None:
        """The first pass: how many weights of each group stay, and the bin of its threshold.

        Args:
            beta: The rule's multiplier.
            kept: How many weights of each group stay, where that is not the rule's to say.
        """
        scan = _Magnitudes(self._group_of, beta, kept, whole_groups=self._team is None)
        self._pass.run(self._targets, scan)
        self.searches = scan.searches
        if self._team is not None:
            # the ranks exchange histograms, not sums: they are integers and add up to the same
            # threshold on every rank, whichever read which part
            group = next(iter(self._group_of.values()))
            together = MagnitudeHistogram()
            own = scan.unfinished.get(group, MagnitudeHistogram())
            for part in self._team.gather(own.to_dict()):
                together.merge(part)
            self.searches = {group: GroupSearch(together, beta, kept)}

    def count_low_parts(self) -> None:
        """The second pass, over float32 weights: the low parts of those in each group's bin."""
        scan = _LowParts(self, whole_groups=self._team is None)
        self._pass.run([t for t in self._targets if t.geometry.number_format is F32], scan)
        if self._team is None:
            return
        (search,) = self.searches.values()
        if search.is_concluded:
            return
        own = scan.unfinished.get(search, np.zeros(LOW_PARTS, np.int64))
        for indices, values in self._team.gather(sparse(own)):
            counts = np.zeros(LOW_PARTS, np.int64)
            counts[indices] = values
            search.add(counts)
        search.conclude()

    def count_ties(self) -> dict[str, list[int | None]]:
        """The last pass: how many weights of each row block equal the threshold.

        Returns:
            By tensor, a number for each row block; None for those whose ties all stay, or all go,
            which are not read.
        """
        scan = _Ties(self, self._targets)
        self._pass.run(self._targets, scan)
        ties = scan.ties
        if self._team is not None:
            for part in self._team.gather(ties):
                ties |= part
        return ties

    def thresholds(
        self, targets: Iterable[Target], ties: Mapping[str, Sequence[int | None]]
    ) -> dict[str, list[Threshold]]:
        """What stays of each row block: where not all ties do, the first ones in order.

        Args:
            targets: All targets of the groups, on all ranks, in order.
            ties: What `count_ties` returned.
        """
        left = {group: search.threshold.kept_ties for group, search in self.searches.items()}
        thresholds: dict[str, list[Threshold]] = {}
        for target in targets:
            chosen = thresholds[target.name] = []
            for block, equal in zip(target.geometry.row_blocks(), ties[target.name], strict=True):
                group = self._group_of[target.name, block.matrix]
                key, exact = self.native_threshold(target, block)
                if equal is None:  # all ties stay, or none; the bytes outnumber the weights
                    stay = target.geometry.block_bytes(block) if exact and left[group] else 0
                else:
                    stay = min(equal, left[group])
                    left[group] -= stay
                chosen.append(Threshold(key, stay))
        return thresholds

    def native_threshold(self, target: Target, block: RowBlock) -> tuple[int, bool]:
        """A row block's threshold in its own format, and whether it is the very same magnitude."""
        key = self.search(target, block.matrix).threshold.key
        return native_threshold(target.geometry.number_format, key)


class _Magnitudes(HistogramScan):
    """Adds up the histograms of each group.

    Attributes:
        searches: The searches in the groups that were read whole.
        unfinished: Histograms of the others.
    """

    def __init__(
        self,
        group_of: Mapping[Matrix, Matrix],
        beta: float,
        kept: int | None,
        *,
        whole_groups: bool,
    ) -> None:
        self._group_of = group_of
        self._beta = beta
        self._kept = kept
        self._whole_groups = whole_groups
        self.searches: dict[Matrix, GroupSearch] = {}
        self.unfinished: dict[Matrix, MagnitudeHistogram] = {}

    def gather(self, target: Target, block: RowBlock, found: BlockHistogram) -> None:
        """Add a row block's histogram to that of its group."""
        group = self._group_of[target.name, block.matrix]
        self.unfinished.setdefault(group, MagnitudeHistogram()).add(found)
        if self._whole_groups and block.stop == target.geometry.matrix_rows:
            # a matrix is a group: its histogram of 1 MB need not be held any longer
            self.searches[group] = GroupSearch(self.unfinished.pop(group), self._beta, self._kept)


class _LowParts(RowBlockScan[Counts]):
    """Adds up the low parts of each group whose threshold is not known without them.

    Attributes:
        unfinished: The counts of groups that were not read whole.
    """

    def __init__(self, survey: GroupSurvey, *, whole_groups: bool) -> None:
        self._survey = survey
        self._whole_groups = whole_groups
        self.unfinished: dict[GroupSearch, Counts] = {}

    def wants(self, target: Target, block: RowBlock) -> bool:
        """Whether the group's threshold is still unknown."""
        return not self._survey.search(target, block.matrix).is_concluded

    def examine(
        self, target: Target, block: RowBlock, weights: Patterns, workspace: Workspace
    ) -> Counts:
        """The low parts of a row block's weights in the group's bin."""
        return count_low_parts(weights, self._survey.search(target, block.matrix).bin, workspace)

    def gather(self, target: Target, block: RowBlock, found: Counts) -> None:
        """Add a row block's counts to those of its group."""
        search = self._survey.search(target, block.matrix)
        known = self.unfinished.get(search)
        self.unfinished[search] = found if known is None else known + found
        if self._whole_groups and block.stop == target.geometry.matrix_rows:
            search.add(self.unfinished.pop(search))
            search.conclude()


class _Ties(RowBlockScan[int]):
    """Counts the weights that equal the threshold, where only some of them stay.

    Attributes:
        ties: By tensor, the number in each row block; None where it was not read.
    """

    def __init__(self, survey: GroupSurvey, targets: Collection[Target]) -> None:
        self._survey = survey
        self.ties: dict[str, list[int | None]] = {target.name: [] for target in targets}

    def wants(self, target: Target, block: RowBlock) -> bool:
        """Whether some of the group's ties stay and others go."""
        _, kept_ties, ties = self._survey.search(target, block.matrix).threshold
        _, exact = self._survey.native_threshold(target, block)
        return exact and kept_ties not in (0, ties)

    def examine(
        self, target: Target, block: RowBlock, weights: Patterns, workspace: Workspace
    ) -> int:
        """How many weights of a row block equal the threshold."""
        key, _ = self._survey.native_threshold(target, block)
        return count_equal(weights, target.geometry.number_format, key, workspace)

    def gather(self, target: Target, _block: RowBlock, found: int) -> None:
        """Take down the number of a row block."""
        self.ties[target.name].append(found)

    def skip(self, target: Target, _block: RowBlock) -> None:
        """Take down that a row block was not read."""
        self.ties[target.name].append(None)
