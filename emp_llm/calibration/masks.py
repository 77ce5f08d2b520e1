"""Scores to masks, by the rule: of one matrix at once, or of all that wait together.

Scores are float32, finite and not negative, so their bit patterns are weights to the kernels, and
N_eff, counts and ties are as exact as those of magnitudes.

Legend: R rows and C columns of a matrix; E matrices of a stack.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from emp_kernels.dispatch import count_rows, select_rows
from emp_kernels.errors import NonFiniteRowError
from emp_kernels.histogram import BlockHistogram, MagnitudeHistogram, count_low_parts
from emp_kernels.numbers import F32, NumberFormat
from emp_kernels.rows import Bytes, Patterns, PerRow, Threshold, Workspace

from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.shard import read_shard
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.errors import CheckpointError
from emp_llm.files.atomic import flush_path, replacing
from emp_llm.options import PruneOptions, counts_magnitudes
from emp_llm.report.tensor_statistics import Group
from emp_llm.runtime.devices import CPU, Devices
from emp_llm.runtime.pipeline import Advance
from emp_llm.selection.group_search import GroupSearch
from emp_llm.selection.mask_store import MaskStore
from emp_llm.selection.mask_writer import MaskWriter
from emp_llm.selection.row_block_pass import RowBlockPass
from emp_llm.selection.selection import Selection, count_together, select
from emp_llm.selection.target_sparsity import find_beta
from emp_llm.tensors.geometry import RowBlock
from emp_llm.tensors.target import Target

__all__ = ["Decided", "check_scores", "decide", "decide_together", "save_scores"]

Scores = npt.NDArray[np.float32]

_COUNTED_AT_A_TIME = 1 << 24
"""Weights, for sums of their low parts fit 64 bits."""


@dataclass(frozen=True)
class Decided:
    """What stays of one matrix.

    Attributes:
        mask: uint8 [R, ⌈C/8⌉], as `emp_kernels.rows.Given` takes it.
        stats: float64 [R, 3], Σs, Σs² and Σ_kept s of the scores.
        kept: int64 [R], how many of each row stay.
        group: The matrix as a group of scores, with granularity `layer`; None with `row`.
    """

    mask: Bytes
    stats: npt.NDArray[np.float64]
    kept: npt.NDArray[np.int64]
    group: Group | None


def check_scores(name: str, scores: Scores, criterion: str, *, first_row: int = 0) -> None:
    """See that scores are such as the rule can take.

    Args:
        name: The tensor, for errors.
        scores: float32 [R, C].
        criterion: What made them.
        first_row: Number of the first row among all rows of the tensor.

    Raises:
        CheckpointError: If one is negative, NaN or infinite.
    """
    bad = ~(np.isfinite(scores) & (scores >= 0))
    if not bad.any():
        return
    row, column = np.argwhere(bad)[0].tolist()
    raise CheckpointError(
        f"{name!r} row {first_row + row} column {column}: its score by the criterion "
        f"{criterion!r} is {scores[row, column]:g}, and a score is finite and not negative: choose "
        "another criterion or calibration text, or leave the tensor out with --ignore"
    )


def decide(
    name: str,
    scores: Scores,
    weights: Patterns,
    number_format: NumberFormat,
    options: PruneOptions,
    *,
    first_row: int = 0,
) -> Decided:
    """Decide which weights of one matrix stay, with granularity `row` or `layer`.

    Args:
        name: The tensor, for errors.
        scores: float32 [R, C].
        weights: uint16 or uint32 [R, C], bit patterns in the checkpoint's format; their magnitudes
            say how many stay with ``count_by="magnitude"``.
        number_format: That format.
        options: The rule.
        first_row: Number of the matrix's first row among all rows of the tensor.

    Raises:
        CheckpointError: If a score is negative, NaN or infinite, or a weight that is counted is
            NaN or infinite.
    """
    check_scores(name, scores, options.criterion, first_row=first_row)
    bits = np.ascontiguousarray(scores).view(np.uint32)
    by_magnitude = options.count_by == "magnitude"
    try:
        if options.granularity == "row":
            counts = None
            if by_magnitude:
                weights = np.ascontiguousarray(weights)
                counts = count_rows(weights, number_format, [options.beta]).kept[:, 0]
            return _decided(bits, PerRow(options.beta), counts, None)
        kept = None
        if by_magnitude:
            kept = GroupSearch(_histogram(weights, number_format), options.beta).kept
    except NonFiniteRowError as error:
        raise CheckpointError(
            f"{name!r} row {first_row + error.row} holds NaN or infinity, which have no magnitude: "
            "repair the checkpoint or leave the tensor out with --ignore"
        ) from error
    search = GroupSearch(_histogram(bits, F32), options.beta, kept)
    if not search.is_concluded:
        search.add(count_low_parts(bits, search.bin))
        search.conclude()
    key, ties, _ = search.threshold
    return _decided(bits, Threshold(key, ties), None, search.group)


def _decided(
    bits: Patterns,
    rule: PerRow | Threshold,
    counts: npt.NDArray[np.int64] | None,
    group: Group | None,
) -> Decided:
    selected = select_rows(bits, rule, kept=counts)
    return Decided(selected.mask, selected.stats, selected.table[:, 0].copy(), group)


def _histogram(bits: Patterns, number_format: NumberFormat) -> MagnitudeHistogram:
    histogram = MagnitudeHistogram()
    step = max(1, _COUNTED_AT_A_TIME // bits.shape[1])
    for start in range(0, len(bits), step):
        try:
            block = BlockHistogram(np.ascontiguousarray(bits[start : start + step]), number_format)
        except NonFiniteRowError as error:
            raise NonFiniteRowError(start + error.row) from error
        histogram.add(block)
    return histogram


def save_scores(path: Path, scores: Mapping[str, Scores], criterion: str) -> None:
    """Let the scores of a block's targets wait on disk, as safetensors.

    Args:
        path: The file, which is on disk, whole, when this returns.
        scores: By target, float32 [R, C], or [E, R, C] of a stack; rows are output neurons, however
            the target is stored.
        criterion: What made them.

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


def decide_together(
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
    """Decide on all targets whose scores wait on disk, with any granularity.

    What the store holds of a block already stays. Where a target sparsity is asked for and the
    scores say how many weights stay, β is found by them.

    Args:
        scores: The files of `save_scores`, by the block that they are of.
        targets: The targets themselves, which are read with ``count_by="magnitude"`` only.
        options: The rule.
        files: The targets' files.
        store: Where to.
        threads: Threads that read and count.
        devices: What their kernels work on.
        progress: Told of the bytes that were read to count and rank.

    Returns:
        The β that was decided by.

    Raises:
        CheckpointError: If something cannot be read, or holds NaN or infinity.
        OSError: If the decisions cannot be written.
    """
    weights = {target.name: target for target in targets}
    shards = {key: read_shard(path) for key, path in sorted(scores.items())}
    scored = {
        key: [Target.of(shard, entry, transposed=False) for entry in shard.header.tensors]
        for key, shard in shards.items()
    }
    everything = [target for part in scored.values() for target in part]
    together = options.granularity == "model"
    kept = None
    if together and options.count_by == "magnitude":
        counted = [weights[target.name] for target in everything]
        kept = count_together(
            counted, options.beta, files, threads=threads, devices=devices, progress=progress
        )
    with OpenFiles() as score_files:
        if options.target_sparsity is not None and not counts_magnitudes(options):
            beta = find_beta(
                everything,
                options.target_sparsity,
                options.granularity,
                RowBlockPass(score_files, threads, progress, devices),
                scratch=store.folder,
            )
            options = replace(options, beta=beta)
        selection = None
        if together:
            selection = select(
                everything,
                options,
                score_files,
                threads=threads,
                devices=devices,
                progress=progress,
                kept=kept,
            )
        for key, shard in shards.items():
            if store.has(key):
                continue
            file = score_files.file(shard)
            with store.writer(key) as block:
                for target in scored[key]:
                    if selection is None:
                        _decide_apart(target, weights[target.name], options, file, files, block)
                    else:
                        _decide_by(selection, target, file, block)
    return options.beta


def _decide_by(selection: Selection, target: Target, file: SourceFile, writer: MaskWriter) -> None:
    """Write what a selection that was made of the scores keeps of a target."""
    workspace, groups = Workspace(), selection.groups[target.name]
    for number, block in enumerate(target.geometry.row_blocks()):
        rule = selection.thresholds[target.name][number]
        rows = select_rows(target.read(file, block, workspace), rule)
        first = groups[block.matrix : block.matrix + 1] if not block.start else ()
        writer.add(target.name, rows.mask, rows.stats, first)


def _decide_apart(
    scored: Target,
    target: Target,
    options: PruneOptions,
    score_file: SourceFile,
    files: OpenFiles,
    writer: MaskWriter,
) -> None:
    """Decide on a target matrix by matrix."""
    geometry = target.geometry
    for matrix in range(geometry.matrices):
        whole = RowBlock(matrix, 0, geometry.matrix_rows)
        scores = scored.read(score_file, whole, Workspace()).view(np.float32)
        weights = scores.view(np.uint32)  # of which nothing is read
        if options.count_by == "magnitude":
            weights = target.read(files.file(target.shard), whole, Workspace())
        decided = decide(
            target.name,
            scores,
            weights,
            geometry.number_format,
            options,
            first_row=geometry.first_row(whole),
        )
        groups = () if decided.group is None else (decided.group,)
        writer.add(target.name, decided.mask, decided.stats, groups)
