"""Prunes the source again and compares the result with a written folder, bit by bit.

    source → decide targets → select → every row block: read, prune, compare with the folder's

Nothing is written. The work on a tensor that was pruned is that of pruning it.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.deltas.base import check_hash, stored_base
from emp_llm.errors import FormatError
from emp_llm.files.checksum import COPY_BYTES
from emp_llm.hub.source import Source
from emp_llm.options import Repair, ranks_magnitudes
from emp_llm.pruning.delta_plan import less_base, plan_delta
from emp_llm.pruning.plan import PruningPlan
from emp_llm.pruning.stages import select_targets
from emp_llm.report.totals import compare_totals, mass_totals
from emp_llm.runtime.pipeline import Piece
from emp_llm.runtime.progress import SharedProgress
from emp_llm.runtime.workers import Workers
from emp_llm.selection.sampled_selection import SampledSelection
from emp_llm.selection.selection import Selection, passes
from emp_llm.tensors.packed_config import is_delta
from emp_llm.tensors.target import Target
from emp_llm.verification.bytes_comparison import ComparedBytes, ComparedWhole
from emp_llm.verification.folder_checks import check_same_config, check_same_files
from emp_llm.verification.target_comparison import ComparedTarget, GivenTarget, RepairedTarget
from emp_llm.verification.tensor_checks import (
    NOT_OF_SOURCE,
    BytesCheck,
    RowsCheck,
    TensorCheck,
    WholeCheck,
)
from emp_llm.verification.written_folder import CheckedTensors, WrittenFolder

__all__ = ["SourceComparison", "compared_with"]


@dataclass(frozen=True, kw_only=True)
class SourceComparison:
    """A source that is open to compare a written folder with; `compared_with` makes it.

    Attributes:
        name: What the user calls the source.
        checkpoint: All that it holds.
        plan: What the folder's rule makes of it.
        targets: The tensors that are pruned, by name.
        selection: What stays of them; None where that came from data.
        files: The source's files.
    """

    name: str
    checkpoint: Checkpoint
    plan: PruningPlan
    targets: Mapping[str, Target]
    selection: Selection | None
    files: OpenFiles

    def pieces(self, check: TensorCheck) -> Iterator[Piece]:
        """The work that checks a tensor of the folder and compares it with the source's.

        Raises:
            FormatError: If it is another kind of tensor here than there.
        """
        if check.name not in self.plan.decisions:
            raise check.fault(f"is not in {self.name}", NOT_OF_SOURCE)
        decision = self.plan.decisions[check.name]
        if decision.prune != isinstance(check, RowsCheck):
            here, there = ("is not", "is") if decision.prune else ("is", "is not")
            raise check.fault(
                f"{here} pruned, by the rule it {there} ({decision.reason}) in {self.name}",
                NOT_OF_SOURCE,
            )
        shard, entry = self.checkpoint.tensors[check.name]
        file = self.files.file(shard)
        if isinstance(check, BytesCheck):
            return self._bytes_pieces(check, entry, file)
        if isinstance(check, WholeCheck):
            return self._whole_pieces(check, entry, file)
        return self._rows_pieces(check, self.targets[check.name], file)

    def check_complete(
        self, written: WrittenFolder, checked: CheckedTensors, progress: SharedProgress
    ) -> None:
        """Check that nothing of the source is missing, and all beside the tensors against it.

        Configuration and other files of a folder without a report, which `save_pretrained` makes
        anew, are not compared.

        Args:
            written: The folder.
            checked: Its tensors, all of them compared.
            progress: Shows how far the work on files beside the weights is.

        Raises:
            CheckpointError: If a file of the source cannot be read.
            FormatError: If something is missing or differs.
        """
        folder, report = written.checkpoint.folder, written.report
        # Of tied tensors that are the same bytes of a file, prune writes one; transformers writes
        # one of those that are equal, and nothing that the model lacks or computes.
        decisions = self.plan.decisions
        missing = {
            name
            for name in self.plan.checkpoint.tensors.keys() - checked.names
            if (report is not None or decisions[name].saved)
            and not self._is_given_by_tie(name, checked)
        }
        if missing:
            raise FormatError(
                f"{folder}: lacks tensor {min(missing)!r} of {self.name} ({len(missing)} missing)"
            )
        if report is None:
            return
        if self.selection is not None:
            # in the order in which the report was summed: sums of floats depend on it
            statistics = [checked.statistics[name] for name in sorted(checked.statistics)]
            compare_totals(report["totals"], "targets", mass_totals(statistics))
        check_same_config(written.checkpoint, self.checkpoint, self.name)
        files = report["files"]
        check_same_files(written.checkpoint, files, self.checkpoint, self.name, progress)

    def _is_given_by_tie(self, name: str, checked: CheckedTensors) -> bool:
        """Whether a tensor is tied to one in the folder whose weights the source has twice."""
        decisions = self.plan.decisions
        root = decisions[name].tied_to or name
        tied = {one for one, other in decisions.items() if root in (one, other.tied_to)} - {name}
        return any(self._same_bytes(name, twin) for twin in tied & checked.names)

    def _same_bytes(self, name: str, other: str) -> bool:
        """Whether two tensors of the source are of one dtype, and the same to the bit."""
        (shard_a, a), (shard_b, b) = (self.checkpoint.tensors[one] for one in (name, other))
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        files = self.files.file(shard_a), self.files.file(shard_b)
        for start in range(0, a.nbytes, COPY_BYTES):
            stretches = [bytearray(min(COPY_BYTES, a.nbytes - start)) for _ in files]
            for file, entry, stretch in zip(files, (a, b), stretches, strict=True):
                file.read_into(entry.start + start, memoryview(stretch))
            if stretches[0] != stretches[1]:
                return False
        return True

    def _bytes_pieces(
        self, check: BytesCheck, entry: TensorEntry, file: SourceFile
    ) -> Iterator[Piece]:
        self._check_kind(
            check,
            _kind(check.entry.dtype, check.entry.shape),
            _kind(entry.dtype, entry.shape),
        )
        # of tensors that are not pruned, repair changes biases only, and recovery norms as well
        is_vector = self.plan.options.recover > 0 and len(check.entry.shape) == 1
        may_change = is_vector or check.name.endswith("bias")
        check.repaired = may_change and self._is_repaired(check, "bias")
        if check.repaired:
            yield from check.pieces()
        else:
            yield from ComparedBytes(check, entry, file, self.name).pieces()

    def _whole_pieces(
        self, check: WholeCheck, entry: TensorEntry, file: SourceFile
    ) -> Iterator[Piece]:
        here = _kind(check.geometry.number_format.name, check.geometry.shape)
        self._check_kind(check, here, _kind(entry.dtype, entry.shape))
        return ComparedWhole(check, entry, file, self.name).pieces()

    def _rows_pieces(self, check: RowsCheck, target: Target, file: SourceFile) -> Iterator[Piece]:
        here, there = (
            _kind(geometry.number_format.name, geometry.shape, geometry.transposed)
            for geometry in (check.geometry, target.geometry)
        )
        self._check_kind(check, here, there)
        check.repaired = self._is_repaired(check, "obs", "swaps")
        if self.selection is None:
            given = GivenTarget(target, file, self.plan.options, check, self.name)
            yield from given.pieces()
            return
        kind = RepairedTarget if check.repaired else ComparedTarget
        job = kind(target, file, self.selection, check, self.name)
        yield from job.pieces()
        yield Piece.note(partial(_check_statistics, check, job))

    def _check_kind(self, check: TensorCheck, here: str, there: str) -> None:
        if here != there:
            raise check.fault(f"is {here}, in {self.name} it is {there}", NOT_OF_SOURCE)

    def _is_repaired(self, check: TensorCheck, *by: Repair) -> bool:
        """Whether a tensor has other weights than the source by the report, or may without one."""
        repairs = self.plan.options.repair in by or self.plan.options.recover > 0
        if check.fields is None:
            return repairs
        repaired = check.fields.get("repaired") is True
        if repaired and not repairs:
            raise check.fault("is repaired by the report, and not by the rule", NOT_OF_SOURCE)
        return repaired


@contextmanager
def compared_with(
    name: str, source: Source, written: WrittenFolder, workers: Workers
) -> Iterator[SourceComparison]:
    """Open a source, and decide by a rule what is pruned and what stays.

    Masks are decided once more where the rule gives them by magnitudes, which may take reading
    these ahead; masks that came from data or from an allocation are not.

    Args:
        name: What the user calls the source.
        source: Where it lies.
        written: The folder, which states the rule and, if it is a delta, the base.
        workers: What reads the source.

    Raises:
        CheckpointError: If the source cannot be pruned by this rule.
        FormatError: If the rule is not known, or the base is not the one that is stated.
        HubError: If the base cannot be downloaded.
    """
    options = written.options()
    checkpoint = source.open_checkpoint()
    plan = PruningPlan.make(source, checkpoint, options)
    if is_delta(written.checkpoint.config):
        plan, checkpoint = _differences(plan, checkpoint, written.checkpoint, workers)
    targets = {target.name: target for target in plan.all_targets}
    with source.files(checkpoint.shards) as files:
        selection: Selection | None = None
        if plan.delta is not None:
            selection = SampledSelection(options.beta)
        elif ranks_magnitudes(options):
            if nbytes := passes(options) * plan.bytes_to_prune(checkpoint.shards):
                workers.progress.begin("selecting", nbytes)
            selection = select_targets(plan, workers, list(targets.values()), files)
        yield SourceComparison(
            name=name,
            checkpoint=checkpoint,
            plan=plan,
            targets=targets,
            selection=selection,
            files=files,
        )


def _differences(
    plan: PruningPlan, checkpoint: Checkpoint, written: Checkpoint, workers: Workers
) -> tuple[PruningPlan, Checkpoint]:
    """Plan and checkpoint of a source with the differences to a delta's base in place of targets.

    Args:
        plan: The plan for the source.
        checkpoint: All that the source holds.
        written: The delta.
        workers: What reads source and base.
    """
    base = stored_base(written.folder, written.config, progress=workers.progress)
    less = plan_delta(plan, base, workers)
    if less.delta is not None:
        check_hash(written.folder, written.config, base, less.delta.base["hash"])
    return less, less_base(plan, checkpoint, base.checkpoint)


def _check_statistics(check: RowsCheck, job: ComparedTarget) -> None:
    check.statistics = job.statistics
    check.expect(**job.statistics.to_dict())


def _kind(dtype: str, shape: tuple[int, ...], transposed: bool = False) -> str:
    return f"{dtype} {list(shape)}{' transposed' if transposed else ''}"
