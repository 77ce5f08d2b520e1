"""Which weights of each block stay: at once for rows, from streamed histograms for larger groups.

`row`     every block decides by itself.
`layer`   each matrix is a group: a pass of exact histograms gives its count and threshold.
`model`   all targets are one group: their histograms are added up.

Where not all weights that equal the threshold stay, another pass counts them block by block, for
the first ones stay: within a tensor in row-major order, among tensors in the order of their names.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from emp_kernels.counting import exact_count
from emp_kernels.dispatch import PerRow, RowFigures, Rule, Threshold, Workspace
from emp_kernels.histogram import (
    LOW_PARTS,
    BlockHistogram,
    MagnitudeHistogram,
    count_equal,
    count_low_parts,
    native_threshold,
    sparse,
)
from emp_kernels.layout import RowLayout
from emp_kernels.numbers import F32
from emp_kernels.rows import Patterns

from emp_llm.block_pass import BlockPass
from emp_llm.devices import CPU, Devices
from emp_llm.geometry import Block
from emp_llm.layout_choice import choose_layout, sample_rows
from emp_llm.options import PruneOptions
from emp_llm.pipeline import Advance
from emp_llm.ranks import Team
from emp_llm.sources.files import OpenFiles
from emp_llm.sources.safetensors_header import TensorEntry
from emp_llm.sources.source_file import SourceFile
from emp_llm.tally import Group
from emp_llm.target import Target

__all__ = ["GroupSearch", "Selection", "SharedGroup", "count_together", "passes", "select"]

Counts = npt.NDArray[np.int64]
Matrix = tuple[str, int]
"""A tensor's name and the number of a matrix in it."""


@dataclass(frozen=True)
class Selection:
    """The decisions for all targets.

    Attributes:
        beta: The rule's multiplier.
        groups: The groups that each tensor's matrices belong to, in order; empty with `row`.
        thresholds: Threshold and the ties it keeps of each block, by tensor; empty with `row`.
    """

    beta: float
    groups: Mapping[str, Sequence[Group]]
    thresholds: Mapping[str, Sequence[Threshold]]

    @property
    def is_bounded(self) -> bool:
        """Whether `emp_llm.tally.mass_bound` holds for what is kept."""
        return self.beta == 1.0

    def groups_of(self, target: Target) -> Sequence[Group] | None:
        """The groups that a target's matrices belong to, in order; None where each row is one."""
        return self.groups.get(target.name)

    def rule(self, target: Target, block: Block) -> Rule:
        """What to keep of one of a target's blocks."""
        if not self.thresholds:
            return PerRow(self.beta)
        return self.thresholds[target.name][target.geometry.block_number(block)]

    def read(
        self, target: Target, file: SourceFile, block: Block, workspace: Workspace
    ) -> Patterns:
        """Read the weights of a target's rows that are kept or go; as `Target.read`."""
        return target.read(file, block, workspace)

    def told(self, target: Target, block: Block, rows: RowFigures) -> RowFigures:  # noqa: ARG002
        """What is to be told of a block that was pruned."""
        return rows

    def layout(self, target: Target, file: SourceFile) -> RowLayout:
        """The layout that a target is packed in, chosen once.

        Raises:
            CheckpointError: If the file cannot be read.
        """

        def choose() -> RowLayout:
            workspace = Workspace()
            sample = sample_rows(
                target.geometry, lambda block: self.read(target, file, block, workspace)
            )
            return choose_layout(sample, target.geometry, self._sample_rule(target))

        return target.layout(choose)

    def copied_from(self, entry: TensorEntry, file: SourceFile) -> SourceFile:  # noqa: ARG002
        """The file that a tensor which is no target is copied from, at the place of its entry."""
        return file

    def _sample_rule(self, target: Target) -> Rule:
        """What to keep of the rows that `sample_rows` takes: by the rule for the first block."""
        return self.rule(target, next(target.geometry.blocks()))


def passes(options: PruneOptions) -> int:
    """How many times the targets are read before they are pruned, at most, float32 aside."""
    return 0 if options.granularity == "row" else 2


@dataclass(frozen=True)
class SharedGroup:
    """One group whose targets several ranks read, each its part of them.

    Attributes:
        targets: All targets of the group.
        team: The ranks.
    """

    targets: Collection[Target]
    team: Team


def select(
    targets: Collection[Target],
    options: PruneOptions,
    files: OpenFiles,
    *,
    threads: int,
    devices: Devices = CPU,
    progress: Advance | None = None,
    shared: SharedGroup | None = None,
    kept: int | None = None,
) -> Selection:
    """Decide what to keep, reading the targets as often as the granularity asks for.

    Args:
        targets: The targets to read.
        options: The rule.
        files: Their files.
        threads: Threads that read and count.
        devices: What their kernels work on.
        progress: Told of the bytes that were read.
        shared: With granularity `model`, all targets, where other ranks read the rest of them;
            each rank then knows what stays of every one.
        kept: With granularity `model`, how many weights stay, if that is not the rule's to say.

    Raises:
        CheckpointError: If a target cannot be read or holds NaN or infinity.
    """
    if options.granularity == "row":
        return Selection(options.beta, {}, {})
    together = options.granularity == "model"
    shared = shared or SharedGroup(targets, Team())
    everything = sorted(shared.targets, key=lambda target: target.name)
    matrices = [(target.name, m) for target in everything for m in range(target.geometry.matrices)]
    if not matrices:
        return Selection(options.beta, {}, {})
    group_of = {matrix: matrices[0] if together else matrix for matrix in matrices}
    ordered = sorted(targets, key=lambda target: target.name)
    team = shared.team if together else None
    block_pass = BlockPass(files, threads, progress, devices)
    survey = _Survey(ordered, group_of, block_pass, team)
    searches = survey.histograms(options.beta, kept)
    survey.low_parts(searches)
    equals = survey.equals(searches)
    return Selection(
        options.beta,
        {
            target.name: [
                searches[group_of[target.name, m]].group for m in range(target.geometry.matrices)
            ]
            for target in everything
        },
        survey.thresholds(searches, everything, equals),
    )


def count_together(
    targets: Collection[Target],
    beta: float,
    files: OpenFiles,
    *,
    threads: int,
    devices: Devices = CPU,
    progress: Advance | None = None,
) -> int:
    """How many weights of some targets stay, of all of them together, by the rule.

    Raises:
        CheckpointError: If a target cannot be read or holds NaN or infinity.
    """
    one = "", 0
    group_of = {(t.name, m): one for t in targets for m in range(t.geometry.matrices)}
    block_pass = BlockPass(files, threads, progress, devices)
    survey = _Survey(list(targets), group_of, block_pass, Team())
    return survey.histograms(beta)[one].kept if group_of else 0


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

        def gather(target: Target, block: Block, counted: BlockHistogram) -> None:
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

        def search(target: Target, block: Block) -> GroupSearch:
            return searches[self._group_of[target.name, block.matrix]]

        def gather(target: Target, block: Block, counts: Counts | None) -> None:
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

        def needless(target: Target, block: Block) -> bool:
            found = self._found(searches, target, block)
            _, exact = native_threshold(target.geometry.number_format, found[0])
            return not exact or found[1] in (0, found[2])

        def count(target: Target, block: Block, weights: Patterns, workspace: Workspace) -> int:
            number_format = target.geometry.number_format
            key, _ = native_threshold(number_format, self._found(searches, target, block)[0])
            return count_equal(weights, number_format, key, workspace)

        def gather(target: Target, _block: Block, equal: int | None) -> None:
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
            for block, equal in zip(target.geometry.blocks(), equals[target.name], strict=True):
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
        self, searches: Mapping[Matrix, GroupSearch], target: Target, block: Block
    ) -> tuple[int, int, int]:
        found = searches[self._group_of[target.name, block.matrix]].found
        assert found is not None  # noqa: S101 (the passes before have found it)
        return found
