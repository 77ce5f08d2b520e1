"""What pruning would do to a checkpoint, found in one pass over its weights; nothing is written."""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from emp_kernels.rows import RowFigures

from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.safetensors_header import encode_header
from emp_llm.checkpoint.shard import Shard
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.errors import OptionError
from emp_llm.hub.source import find_source
from emp_llm.options import OutputFormat, PruneOptions, needs_masks
from emp_llm.pruning.beta_curve import CurveJob, build_curve
from emp_llm.pruning.planned_run import PlannedRun, origin
from emp_llm.pruning.shard_plan import ShardPlan, output_name
from emp_llm.pruning.target_jobs import MeasureJob, TargetJob
from emp_llm.report.outlier_rows import StandingOut
from emp_llm.report.report import Outcome
from emp_llm.runtime.pipeline import Piece, Write, thread_count
from emp_llm.runtime.progress import Progress, SharedProgress, Silent
from emp_llm.selection.selection import Selection
from emp_llm.tensors.geometry import RowBlock
from emp_llm.tensors.target import Target

__all__ = ["inspect"]


def inspect(
    model: str | os.PathLike[str],
    options: PruneOptions | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    curve: bool = True,
    download: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Find what `prune` would do, reading all targets once and writing nothing.

    Arguments and errors are those of `prune`. The sizes are the ones that packing would give.

    Args:
        model: As for `prune`.
        options: As for `prune`.
        revision: As for `prune`.
        token: As for `prune`.
        curve: Whether to find it for many β at once; with granularity `row` only.
        download: Whether shards of the Hub that are not in its cache are downloaded to there. By
            default only the targets are read of them, and nothing is kept; with granularity
            `layer` and `model` and with a target sparsity, which read more than once, they are
            always downloaded.
        threads: As for `prune`.
        progress: As for `prune`.

    Returns:
        The report that `prune` would write, without checksums, and beside it

        * ``files``: of each file of weights that would be written its ``bytes``, header and all;
          their sum is in ``totals`` under ``files``, with that of the source's, and that of the
          files which ``--format dense`` would write;
        * ``standing_out``: rows unlike the others, at most 100 and the worst first, each with its
          ``tensor``, ``row``, ``why``, ``n_eff_fraction`` (N_eff / N) and ``mass_ratio`` (its Σ|w|
          over the median of the tensor's rows); see `emp_llm.report.outlier_rows` for the
          thresholds;
        * ``standing_out_counts``: how many there are in all, by why;
        * ``curve``: see `emp_llm.pruning.beta_curve.build_curve`; None where groups are larger
        than rows,
          or it was not asked for.
    """
    options = options or PruneOptions()
    if needs_masks(options):
        raise OptionError(
            f"criterion {options.criterion!r} with repair {options.repair!r}: what scores from "
            "data and repair come to is known by pruning only; inspect by magnitude"
        )
    if options.max_loss_increase is not None:
        raise OptionError("max_loss_increase: inspect runs no model; let prune search for β")
    told = SharedProgress(progress or Silent())
    by_row = options.granularity == "row"
    whole = download or not by_row or options.target_sparsity is not None
    source = find_source(model, revision=revision, token=token, whole=whole, progress=told)
    run = _InspectRun(source, source.open_checkpoint(), options, thread_count(threads), told)
    run.find_beta()
    return run.measure(origin(model, source), curve=curve and by_row, whole=whole)


class _StatsJob(TargetJob):
    """A job that keeps the sums of each row, [R, 3], as blocks."""

    def __init__(self, target: Target, file: SourceFile, selection: Selection) -> None:
        super().__init__(target, file, selection)
        self.stats: list[npt.NDArray[np.float64]] = []

    def settle(self, block: RowBlock, rows: RowFigures) -> Write | None:
        """Take note of a block."""
        self.stats.append(rows.stats)
        return super().settle(block, rows)  # type: ignore[safe-super]


class _CurveJob(_StatsJob, CurveJob):
    """Every β at once."""


class _MeasureJob(_StatsJob, MeasureJob):
    """The one that was asked for."""


class _InspectRun(PlannedRun):
    """One checkpoint being inspected."""

    def measure(self, origin: dict[str, Any], *, curve: bool, whole: bool) -> dict[str, Any]:
        """Read all targets; returns the report."""
        shards = [shard for shard in self.checkpoint.shards if self.targets[shard.name]]
        standing_out = StandingOut()
        jobs: list[_StatsJob] = []
        targets = [target for shard in shards for target in self.targets[shard.name]]
        with self.source.files(shards) if whole else self.source.ranges(targets) as files:
            measure = partial(
                self._measuring, files, _CurveJob if curve else _MeasureJob, jobs, standing_out
            )
            self.run("measuring", self.bytes_to_prune(shards), shards, files, measure)
        report = self.report({job.entry.name: Outcome(job.figures) for job in jobs}, origin)
        files_before = sum(shard.header.file_size for shard in self.checkpoint.shards)
        packed, dense = self._file_sizes(report, "packed"), self._file_sizes(report, "dense")
        report["files"] = {name: {"bytes": nbytes} for name, nbytes in packed.items()}
        report["totals"]["files"] = {
            "bytes_before": files_before,
            "bytes_after": sum(packed.values()),
            "bytes_dense": sum(dense.values()),
        }
        kinds = {name: decision.kind for name, decision in self.decisions.items()}
        curves = [job for job in jobs if isinstance(job, CurveJob)]
        report |= standing_out.to_dict()
        report["curve"] = build_curve(curves, kinds) if curves else None
        return report

    def _measuring(
        self,
        files: OpenFiles,
        kind: type[_CurveJob] | type[_MeasureJob],
        jobs: list[_StatsJob],
        standing_out: StandingOut,
        shard: Shard,
        selection: Selection,
    ) -> Iterator[Piece]:
        for target in self.targets[shard.name]:
            job = kind(target, files.file(shard), selection)
            jobs.append(job)
            yield from job.pieces()
            yield Piece.note(partial(_look, standing_out, job))
        yield Piece.note(partial(files.done, shard))

    def _file_sizes(self, report: dict[str, Any], output_format: OutputFormat) -> dict[str, int]:
        """Bytes of the files of weights that would be written, by name."""
        after = "bytes_after" if output_format == "packed" else "bytes_before"
        sizes = {}
        for shard in self.checkpoint.shards:
            plan = ShardPlan.make(shard, self.targets[shard.name], output_format)
            header = len(encode_header(plan.entries_at_most(), shard.header.metadata))
            data = sum(report["tensors"][entry.name][after] for entry in plan.entries)
            sizes[output_name(self.checkpoint, shard)] = header + data
        return sizes


def _look(standing_out: StandingOut, job: _StatsJob) -> None:
    geometry = job.target.geometry
    standing_out.look(job.target.name, geometry.columns, np.concatenate(job.stats))
    job.stats.clear()
