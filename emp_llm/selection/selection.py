"""Masks of row blocks, decided by the weights alone.

`row`     each row is a group: nothing has to be known of other rows.
`layer`   each matrix is a group: a pass of exact histograms gives its count and threshold.
`model`   all targets are one group: their histograms are added up.

Where only some of the weights that equal the threshold stay, the first ones do: within a tensor in
row-major order, among tensors in the order of their names.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from emp_kernels.layout import RowLayout
from emp_kernels.rows import Patterns, PerRow, RowStatistics, Rule, Threshold, Workspace

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.options import PruneOptions
from emp_llm.report.tensor_statistics import Group
from emp_llm.runtime.devices import CPU, Devices
from emp_llm.runtime.pipeline import Advance
from emp_llm.runtime.team import Team
from emp_llm.selection.group_search import GroupSurvey
from emp_llm.selection.row_block_pass import RowBlockPass
from emp_llm.tensors.geometry import RowBlock
from emp_llm.tensors.layout_choice import choose_layout, sample_rows
from emp_llm.tensors.target import Target

__all__ = ["Selection", "SharedGroup", "count_together", "passes", "select"]


Rows = TypeVar("Rows", bound=RowStatistics)


@dataclass(frozen=True)
class Selection:
    """What to keep of all targets.

    Attributes:
        beta: The rule's multiplier.
        groups: By tensor, the group of each matrix in order; empty with granularity `row`.
        thresholds: By tensor, the threshold of each row block and the ties that it keeps; empty
            with granularity `row`.
    """

    beta: float
    groups: Mapping[str, Sequence[Group]]
    thresholds: Mapping[str, Sequence[Threshold]]

    @property
    def is_bounded(self) -> bool:
        """Whether `emp_llm.report.tensor_statistics.mass_bound` holds for what is kept."""
        return self.beta == 1.0

    def groups_of(self, target: Target) -> Sequence[Group] | None:
        """The group of each of a target's matrices, in order; None where each row is a group."""
        return self.groups.get(target.name)

    def rule(self, target: Target, block: RowBlock) -> Rule:
        """What to keep of one of a target's row blocks."""
        if not self.thresholds:
            return PerRow(self.beta)
        return self.thresholds[target.name][target.geometry.block_number(block)]

    def read(
        self, target: Target, file: SourceFile, block: RowBlock, workspace: Workspace
    ) -> Patterns:
        """Read the weights that the rule is applied to; as `Target.read`."""
        return target.read(file, block, workspace)

    def with_score_sums(self, _target: Target, _block: RowBlock, rows: Rows) -> Rows:
        """The statistics of a pruned row block, with sums of its scores: here, of magnitudes."""
        return rows

    def layout(self, target: Target, file: SourceFile) -> RowLayout:
        """The layout that a target is packed in, chosen once from a sample of its rows.

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

    def copied_from(self, _entry: TensorEntry, file: SourceFile) -> SourceFile:
        """The file that a tensor which is not pruned is copied from, at the place of its entry."""
        return file

    def _sample_rule(self, target: Target) -> Rule:
        """What to keep of the rows that `sample_rows` takes: as for the first row block."""
        return self.rule(target, next(target.geometry.row_blocks()))


def passes(options: PruneOptions) -> int:
    """How often the targets are read before they are pruned, at most; once more if in float32."""
    return 0 if options.granularity == "row" else 2


@dataclass(frozen=True)
class SharedGroup:
    """One group whose targets are read by several ranks, each a part of them.

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
    """Decide what to keep; targets are read as often as the granularity needs.

    Args:
        targets: The targets that this rank reads.
        options: The rule.
        files: The targets' files.
        threads: Threads that read and count.
        devices: Devices that their kernels run on.
        progress: Called with the bytes that were read.
        shared: With granularity `model`, all targets, where other ranks read the rest of them;
            each rank then knows what stays of every one.
        kept: With granularity `model`, how many weights stay, where that is not decided by the
            values that are read.

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
    # in the order of names, not of shards: which ties stay must not depend on how files are split
    ordered = sorted(targets, key=lambda target: target.name)
    team = shared.team if together else None
    row_block_pass = RowBlockPass(files, threads, progress, devices)
    survey = GroupSurvey(ordered, group_of, row_block_pass, team)
    survey.count_magnitudes(options.beta, kept)
    survey.count_low_parts()
    ties = survey.count_ties()
    return Selection(
        options.beta,
        {
            target.name: [survey.search(target, m).group for m in range(target.geometry.matrices)]
            for target in everything
        },
        survey.thresholds(everything, ties),
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
    """How many weights of some targets stay, as one group, by the rule on their magnitudes.

    Args:
        targets: The targets.
        beta: The rule's multiplier.
        files: The targets' files.
        threads: Threads that read and count.
        devices: Devices that their kernels run on.
        progress: Called with the bytes that were read.

    Raises:
        CheckpointError: If a target cannot be read or holds NaN or infinity.
    """
    everything = "", 0
    group_of = {(t.name, m): everything for t in targets for m in range(t.geometry.matrices)}
    if not group_of:
        return 0
    row_block_pass = RowBlockPass(files, threads, progress, devices)
    survey = GroupSurvey(list(targets), group_of, row_block_pass, Team())
    survey.count_magnitudes(beta)
    return survey.searches[everything].kept
