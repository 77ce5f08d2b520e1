"""Which weights of each block stay: at once for rows, from streamed histograms for larger groups.

`row`     every block decides by itself.
`layer`   each matrix is a group: a pass of exact histograms gives its count and threshold.
`model`   all targets are one group: their histograms are added up.

Where not all weights that equal the threshold stay, another pass counts them block by block, for
the first ones stay: within a tensor in row-major order, among tensors in the order of their names.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from emp_kernels.layout import RowLayout
from emp_kernels.rows import Patterns, PerRow, RowFigures, Rule, Threshold, Workspace

from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.options import PruneOptions
from emp_llm.report.tensor_statistics import Group
from emp_llm.runtime.devices import CPU, Devices
from emp_llm.runtime.pipeline import Advance
from emp_llm.runtime.team import Team
from emp_llm.selection.block_pass import BlockPass
from emp_llm.selection.group_search import _Survey
from emp_llm.tensors.geometry import RowBlock
from emp_llm.tensors.layout_choice import choose_layout, sample_rows
from emp_llm.tensors.target import Target

__all__ = ["Selection", "SharedGroup", "count_together", "passes", "select"]


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
        """Whether `emp_llm.report.tensor_statistics.mass_bound` holds for what is kept."""
        return self.beta == 1.0

    def groups_of(self, target: Target) -> Sequence[Group] | None:
        """The groups that a target's matrices belong to, in order; None where each row is one."""
        return self.groups.get(target.name)

    def rule(self, target: Target, block: RowBlock) -> Rule:
        """What to keep of one of a target's blocks."""
        if not self.thresholds:
            return PerRow(self.beta)
        return self.thresholds[target.name][target.geometry.block_number(block)]

    def read(
        self, target: Target, file: SourceFile, block: RowBlock, workspace: Workspace
    ) -> Patterns:
        """Read the weights of a target's rows that are kept or go; as `Target.read`."""
        return target.read(file, block, workspace)

    def told(self, target: Target, block: RowBlock, rows: RowFigures) -> RowFigures:  # noqa: ARG002
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
        return self.rule(target, next(target.geometry.row_blocks()))


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
