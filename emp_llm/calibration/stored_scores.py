"""Scores stored on disk until those of all targets are known, and the masks computed from them.

Shapes in names: E matrices of a stack, R rows and C columns of a matrix.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from emp_kernels.dispatch import select_rows
from emp_kernels.rows import Workspace

from emp_llm.calibration.masks import Scores, check_scores, mask_by_scores
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.shard import Shard, read_shard
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.files.atomic import flush_path, replacing
from emp_llm.options import Granularity, PruneOptions, counts_magnitudes
from emp_llm.runtime.devices import CPU, Devices
from emp_llm.runtime.pipeline import Advance
from emp_llm.selection.mask_store import MaskStore
from emp_llm.selection.mask_writer import MaskWriter
from emp_llm.selection.row_block_pass import RowBlockPass
from emp_llm.selection.selection import Selection, count_together, select
from emp_llm.selection.target_sparsity import find_beta
from emp_llm.tensors.geometry import RowBlock
from emp_llm.tensors.target import Target

__all__ = ["mask_by_stored_scores", "save_scores"]


def save_scores(path: Path, scores: Mapping[str, Scores], criterion: str) -> None:
    """Write the scores of a unit's targets to a file of safetensors.

    Args:
        path: The file; it is on disk, whole, when this returns.
        scores: By target, float32 [R, C], or [E, R, C] of a stack. Rows are output neurons, however
            the target is stored.
        criterion: Name of the criterion that gave them, for errors.

    Raises:
        CheckpointError: If a score is negative, NaN or infinite.
        OSError: If they cannot be written.
    """
    for name, values in scores.items():
        check_scores(name, values.reshape(-1, values.shape[-1]), criterion)
    from safetensors.numpy import save_file

    with replacing(path) as unfinished:
        save_file({name: np.ascontiguousarray(array) for name, array in scores.items()}, unfinished)
    flush_path(path.parent)


def mask_by_stored_scores(
    scores: Mapping[str, Path],
    targets: Collection[Target],
    options: PruneOptions,
    files: OpenFiles,
    store: MaskStore,
    *,
    threads: int,
    devices: Devices = CPU,
    progress: Advance | None = None,
) -> float:
    """Mask all targets whose scores wait on disk, with any granularity.

    Units whose masks are in the store keep them. Where a target sparsity is given and the scores
    decide how many weights stay, β is found from the scores.

    Args:
        scores: The files of `save_scores`, by unit.
        targets: The targets, which are read with ``count_by="magnitude"`` only.
        options: The rule.
        files: The targets' files.
        store: Takes the masks.
        threads: Threads that read and count.
        devices: Devices that their kernels run on.
        progress: Called with the bytes that were read to count and rank.

    Returns:
        β.

    Raises:
        CheckpointError: If scores or targets cannot be read, or hold NaN or infinity.
        OptionError: If no β gives the target sparsity.
        OSError: If the masks cannot be written.
    """
    with OpenFiles() as score_files:
        reading = _Reading(score_files, files, threads, devices, progress)
        waiting = _WaitingScores(scores, targets, reading)
        sparsity = options.target_sparsity
        if sparsity is not None and not counts_magnitudes(options):
            beta = waiting.find_beta(sparsity, options.granularity, store.folder)
            options = replace(options, beta=beta)
        selection = waiting.select(options) if options.granularity == "model" else None
        for unit in waiting.units:
            if not store.has(unit):
                with store.writer(unit) as writer:
                    waiting.mask_unit(unit, options, selection, writer)
    return options.beta


@dataclass(frozen=True)
class _Reading:
    """How scores and weights are read: their files, threads, devices and progress."""

    score_files: OpenFiles
    files: OpenFiles
    threads: int
    devices: Devices
    progress: Advance | None


class _WaitingScores:
    """The scores of all units, as float32 tensors that the rule is applied to like weights."""

    def __init__(
        self, paths: Mapping[str, Path], targets: Collection[Target], reading: _Reading
    ) -> None:
        self._weights = {target.name: target for target in targets}
        self._reading = reading
        self.units = {unit: read_shard(path) for unit, path in sorted(paths.items())}
        self._scored = {unit: _score_targets(shard) for unit, shard in self.units.items()}
        self._all_scored = [target for part in self._scored.values() for target in part]

    def find_beta(self, target_sparsity: float, granularity: Granularity, scratch: Path) -> float:
        """The β at which the scores give the target sparsity."""
        read = self._reading
        return find_beta(
            self._all_scored,
            target_sparsity,
            granularity,
            RowBlockPass(read.score_files, read.threads, read.progress, read.devices),
            scratch=scratch,
        )

    def select(self, options: PruneOptions) -> Selection:
        """What stays of all targets together, ranked by their scores."""
        read, kept = self._reading, None
        if options.count_by == "magnitude":
            kept = count_together(
                [self._weights[target.name] for target in self._all_scored],
                options.beta,
                read.files,
                threads=read.threads,
                devices=read.devices,
                progress=read.progress,
            )
        return select(
            self._all_scored,
            options,
            read.score_files,
            threads=read.threads,
            devices=read.devices,
            progress=read.progress,
            kept=kept,
        )

    def mask_unit(
        self, unit: str, options: PruneOptions, selection: Selection | None, writer: MaskWriter
    ) -> None:
        """Write the masks of a unit: those of a selection, or else matrix by matrix."""
        file = self._reading.score_files.file(self.units[unit])
        for scored in self._scored[unit]:
            if selection is None:
                self._mask_matrices(scored, options, file, writer)
            else:
                _mask_by_selection(selection, scored, file, writer)

    def _mask_matrices(
        self, scored: Target, options: PruneOptions, score_file: SourceFile, writer: MaskWriter
    ) -> None:
        target = self._weights[scored.name]
        geometry = target.geometry
        for matrix in range(geometry.matrices):
            whole = RowBlock(matrix, 0, geometry.matrix_rows)
            scores = scored.read(score_file, whole, Workspace()).view(np.float32)
            weights = scores.view(np.uint32)  # a stand-in: only with `magnitude` they are looked at
            if options.count_by == "magnitude":
                file = self._reading.files.file(target.shard)
                weights = target.read(file, whole, Workspace())
            masked = mask_by_scores(
                target.name,
                scores,
                weights,
                geometry.number_format,
                options,
                first_row=geometry.first_row(whole),
            )
            groups = () if masked.group is None else (masked.group,)
            writer.add(target.name, masked.mask, masked.stats, groups)


def _score_targets(shard: Shard) -> list[Target]:
    # scores are stored [rows, columns] even where the weights are stored transposed
    return [Target.of(shard, entry, transposed=False) for entry in shard.header.tensors]


def _mask_by_selection(
    selection: Selection, scored: Target, score_file: SourceFile, writer: MaskWriter
) -> None:
    """Write the masks that a selection, made of the scores, gives a target."""
    workspace, groups = Workspace(), selection.groups[scored.name]
    for number, block in enumerate(scored.geometry.row_blocks()):
        rule = selection.thresholds[scored.name][number]
        rows = select_rows(scored.read(score_file, block, workspace), rule)
        # a matrix's group is recorded once, with the first of its row blocks
        first = groups[block.matrix : block.matrix + 1] if not block.start else ()
        writer.add(scored.name, rows.mask, rows.stats, first)
