"""The search for the threshold of a group that is larger than a row."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from emp_kernels.counting import exact_count
from emp_kernels.histogram import (
    LOW_PARTS,
    BlockHistogram,
    MagnitudeHistogram,
    count_equal,
    count_low_parts,
    native_threshold,
    sparse,
)
from emp_kernels.numbers import F32
from emp_kernels.rows import Patterns, Threshold, Workspace

from emp_llm.report.tensor_statistics import Group
from emp_llm.runtime.team import Team
from emp_llm.selection.block_pass import BlockPass
from emp_llm.tensors.geometry import RowBlock
from emp_llm.tensors.target import Target

__all__ = ["GroupSearch"]


Counts = npt.NDArray[np.int64]
Matrix = tuple[str, int]
"""A tensor's name and the number of a matrix in it."""


class GroupSearch:
    """The threshold of one group, narrowed down pass by pass.

    Args:
        histogram: All of its magnitudes.
        beta: The rule's multiplier.
        kept: How many of them stay, if that is not the rule's to say.

    Attributes:
        group: The group's figures.
        kept: How many of it stay.
        bin: The bin that its threshold lies in.
        found: Float32 key of the k-th largest magnitude, how many ties it keeps, and of how many;
            None while float32 weights of the bin are still to be added.
    """

    def __init__(self, histogram: MagnitudeHistogram, beta: float, kept: int | None = None) -> None:
        size = histogram.size
        s1, s2 = histogram.sums()
        kept = exact_count(s1, s2, size, beta) if kept is None else kept
        self.group = Group(float(s1 * s1 / s2) if s2 else 0.0, size, float(s1))
        self.kept = kept
        self.bin = F32.infinity >> 16
        self.found: tuple[int, int, int] | None = None
        if not kept:
            self.found = F32.infinity, 0, 0
            return
        self.bin, self._rank = histogram.find_bin(kept)
        known, incomplete = histogram.low_parts(self.bin)
        # thousands of groups are searched at once: what is all zeros need not be held
        self._counts: Counts | None = known if known.any() or not incomplete else None
        if not incomplete:
            self.conclude()

    def add(self, counts: Counts) -> None:
        """Add the low parts of float32 weights in the bin."""
        self._counts = counts if self._counts is None else self._counts + counts

    def conclude(self) -> None:
        """All weights of the bin are known: find the threshold among them."""
        assert self._counts is not None  # noqa: S101 (the bin was chosen for its weights)
        reaching = np.cumsum(self._counts[::-1])
        place = int(np.searchsorted(reaching, self._rank))
        low = len(reaching) - 1 - place
        tied = int(self._counts[low])
        above = int(reaching[place]) - tied
        self.found = self.bin << 16 | low, self._rank - above, tied
        self._counts = None


class _Survey:
    """Passes over targets that gather something of every block.

    With a team, all targets are one group, of which this rank reads a part.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        group_of: Mapping[Matrix, Matrix],
        block_pass: BlockPass,
        team: Team | None,
    ) -> None:
        self._targets = targets
        self._group_of = group_of
        self._pass = block_pass
        self._team = team

    def histograms(self, beta: float, kept: int | None = None) -> dict[Matrix, GroupSearch]:
        """The first pass: counts and bins of all groups."""
        open_groups: dict[Matrix, MagnitudeHistogram] = {}
        searches: dict[Matrix, GroupSearch] = {}

        def gather(target: Target, block: RowBlock, counted: BlockHistogram) -> None:
            group = self._group_of[target.name, block.matrix]
            open_groups.setdefault(group, MagnitudeHistogram()).add(counted)
            if self._team is None and block.stop == target.geometry.matrix_rows:
                searches[group] = GroupSearch(open_groups.pop(group), beta, kept)

        self._pass.run(
            self._targets,
            lambda t, _, w, space: BlockHistogram(w, t.geometry.number_format, space),
            gather,
        )
        if self._team is not None:
            group = next(iter(self._group_of.values()))
            together = MagnitudeHistogram()
            for part in self._team.gather(open_groups.get(group, together).to_dict()):
                together.merge(part)
            searches[group] = GroupSearch(together, beta, kept)
        return searches

    def low_parts(self, searches: Mapping[Matrix, GroupSearch]) -> None:
        """For float32 weights: the lower bits of those in each group's bin."""
        sums: dict[Matrix, Counts] = {}

        def search(target: Target, block: RowBlock) -> GroupSearch:
            return searches[self._group_of[target.name, block.matrix]]

        def gather(target: Target, block: RowBlock, counts: Counts | None) -> None:
            group = self._group_of[target.name, block.matrix]
            if counts is not None:
                sums[group] = sums[group] + counts if group in sums else counts
            if group in sums and self._team is None and block.stop == target.geometry.matrix_rows:
                searches[group].add(sums.pop(group))
                searches[group].conclude()

        self._pass.run(
            [t for t in self._targets if t.geometry.number_format is F32],
            lambda t, b, w, space: count_low_parts(w, search(t, b).bin, space),
            gather,
            unless=lambda t, b: search(t, b).found is not None,
        )
        if self._team is None:
            return
        ((group, sought),) = searches.items()
        if sought.found is None:
            for indices, values in self._team.gather(sparse(sums.get(group, np.zeros(0)))):
                counts = np.zeros(LOW_PARTS, np.int64)
                counts[indices] = values
                sought.add(counts)
            sought.conclude()

    def equals(self, searches: Mapping[Matrix, GroupSearch]) -> dict[str, list[int | None]]:
        """The last pass: how many weights of each block equal the threshold.

        None for blocks of which all of these stay, or none.
        """
        counted: dict[str, list[int | None]] = {target.name: [] for target in self._targets}

        def needless(target: Target, block: RowBlock) -> bool:
            found = self._found(searches, target, block)
            _, exact = native_threshold(target.geometry.number_format, found[0])
            return not exact or found[1] in (0, found[2])

        def count(target: Target, block: RowBlock, weights: Patterns, workspace: Workspace) -> int:
            number_format = target.geometry.number_format
            key, _ = native_threshold(number_format, self._found(searches, target, block)[0])
            return count_equal(weights, number_format, key, workspace)

        def gather(target: Target, _block: RowBlock, equal: int | None) -> None:
            counted[target.name].append(equal)

        self._pass.run(self._targets, count, gather, unless=needless)
        if self._team is not None:
            for part in self._team.gather(counted):
                counted |= part
        return counted

    def thresholds(
        self,
        searches: Mapping[Matrix, GroupSearch],
        targets: Iterable[Target],
        equals: Mapping[str, Sequence[int | None]],
    ) -> dict[str, list[Threshold]]:
        """What stays of each block: where not all ties do, the first ones in order."""
        left = {group: search.found[1] for group, search in searches.items() if search.found}
        thresholds: dict[str, list[Threshold]] = {}
        for target in targets:
            chosen = thresholds[target.name] = []
            for block, equal in zip(target.geometry.row_blocks(), equals[target.name], strict=True):
                group = self._group_of[target.name, block.matrix]
                found = self._found(searches, target, block)
                key, exact = native_threshold(target.geometry.number_format, found[0])
                if equal is None:  # all of the ties stay, or none
                    stay = target.geometry.block_bytes(block) if exact and left[group] else 0
                else:
                    stay = min(equal, left[group])
                    left[group] -= stay
                chosen.append(Threshold(key, stay))
        return thresholds

    def _found(
        self, searches: Mapping[Matrix, GroupSearch], target: Target, block: RowBlock
    ) -> tuple[int, int, int]:
        found = searches[self._group_of[target.name, block.matrix]].found
        assert found is not None  # noqa: S101 (the passes before have found it)
        return found
