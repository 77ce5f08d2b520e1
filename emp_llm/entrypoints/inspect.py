"""Inspect: what pruning would do to a checkpoint, from one pass over what it would pack.

    source → targets → β → measure: rows, sizes, the curve over β → report

Nothing is written.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Literal

import numpy as np
import numpy.typing as npt
from emp_kernels.rows import PackedRows

from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.safetensors_header import encode_header
from emp_llm.checkpoint.shard import Shard
from emp_llm.checkpoint.source_file import SourceFile
from emp_llm.errors import OptionError
from emp_llm.hub.source import find_source
from emp_llm.options import OutputFormat, PruneOptions, needs_masks
from emp_llm.pruning.beta_curve import CurveJob, CurveRows, build_curve
from emp_llm.pruning.pack_job import MeasureJob
from emp_llm.pruning.plan import PruningPlan
from emp_llm.pruning.plan_report import origin, report_on
from emp_llm.pruning.rest_job import MeasureRestJob
from emp_llm.pruning.shard_plan import ShardPlan, output_name
from emp_llm.pruning.stages import Stage, beta_for_target_sparsity, run_stage
from emp_llm.pruning.target_job import Rows, TargetJob
from emp_llm.report.fields import Report
from emp_llm.report.outlier_rows import StandingOut
from emp_llm.report.report import Outcome
from emp_llm.report.totals import file_totals
from emp_llm.runtime.pipeline import Piece, thread_count
from emp_llm.runtime.progress import Progress, SharedProgress, Silent
from emp_llm.runtime.workers import Workers
from emp_llm.selection.selection import Selection
from emp_llm.tensors.read_order import Span, rest_spans, target_spans
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
) -> Report:
    """Find what `prune` would do, without writing anything.

    >>> from emp_llm import inspect
    >>> report = inspect("demo/model")
    >>> report["totals"]["files"]
    {'bytes_before': 3792240, 'bytes_after': 2137648, 'bytes_dense': 3792240}
    >>> curve = report["curve"]
    >>> for beta, sparsity in zip(curve["beta"], curve["targets"]["sparsity"]):
    ...     if beta in (0.5, 1.0, 1.3):
    ...         print(f"β = {beta}: {sparsity:.0%} of the targets' weights would go")
    β = 0.5: 68% of the targets' weights would go
    β = 1.0: 36% of the targets' weights would go
    β = 1.3: 17% of the targets' weights would go

    Args:
        model: A folder, or a model of the Hugging Face Hub.
        options: What to prune, and how, by magnitude; the paper's choice by default.
        revision: Branch, tag or commit of a model of the Hub.
        token: Token for the Hub; by default the one that is logged in.
        curve: Whether to compute the curve over β; with granularity `row` only.
        download: Whether shards of the Hub that are not in its cache are downloaded to there. By
            default only what would be packed is read of them, and nothing is kept; with granularity
            `layer` and `model` and with a target sparsity, which read more than once, they are
            always downloaded.
        threads: Threads that read and compute; by default all cores.
        progress: Shows how far the work is.

    Returns:
        The report that `prune` would write, with the sizes that packing would give, without
        checksums, and with

        * ``files``: the ``bytes`` of each file of weights that would be written, header and all;
          their sum is in ``totals`` under ``files``, with that of the source's files, and that of
          the files that ``--format dense`` would write;
        * ``standing_out``: rows unlike the others, at most 100 and the worst first, each with its
          ``tensor``, ``row``, ``why``, ``n_eff_fraction`` (N_eff / N) and ``mass_ratio`` (its Σ|w|
          over the median of the tensor's rows); see `emp_llm.report.outlier_rows` for the
          thresholds;
        * ``standing_out_counts``: how many there are in all, by why;
        * ``curve``: see `emp_llm.pruning.beta_curve.build_curve`; None where groups are larger than
          rows, or it was not asked for.

    Raises:
        CheckpointError: If the source is not a checkpoint that can be pruned.
        HubError: If it cannot be downloaded.
        OptionError: If the options ask for scores from data, for repair or for a search for β,
            which run the model; if no β gives the target sparsity.
    """
    options = options or PruneOptions()
    if needs_masks(options):
        raise OptionError(
            f"criterion {options.criterion!r} with repair {options.repair!r}, recover "
            f"{options.recover} and allocate {options.allocate!r}: inspect cannot predict what is "
            "made from data or allocated; run prune, or inspect by magnitude"
        )
    if options.max_loss_increase is not None:
        raise OptionError("max_loss_increase: inspect runs no model; let prune search for β")
    by_row = options.granularity == "row"
    whole = download or not by_row or options.target_sparsity is not None
    workers = Workers(threads=thread_count(threads), progress=SharedProgress(progress or Silent()))
    source = find_source(
        model,
        revision=revision,
        token=token,
        whole=whole,
        beside=download,
        progress=workers.progress,
    )
    plan = PruningPlan.make(source, source.open_checkpoint(), options)
    plan = plan.with_beta(beta_for_target_sparsity(plan, workers))
    shard_plans = _plans_to_measure(plan)
    shards = [shard_plan.shard for shard_plan in shard_plans]
    spans = chain.from_iterable(map(_spans, shard_plans))
    with source.files(shards) if whole else source.ranges(shards, spans) as files:
        jobs, rest, standing_out = _measure(
            plan, workers, files, shard_plans, _CurveJob if curve and by_row else _MeasureJob
        )
    outcomes = {job.entry.name: Outcome(job.statistics) for job in jobs}
    outcomes |= {job.entry.name: Outcome(packed_bytes=job.packed_bytes) for job in rest}
    report = report_on(plan, outcomes, origin(model, source))
    _report_files(report, plan)
    report["standing_out"] = standing_out.worst
    report["standing_out_counts"] = standing_out.counts
    kinds = {name: decision.kind for name, decision in plan.decisions.items()}
    curves = [job for job in jobs if isinstance(job, CurveJob)]
    report["curve"] = build_curve(curves, kinds) if curves else None
    return report


class _SumsJob(TargetJob[Rows]):
    """A job that keeps the sums of each row.

    Attributes:
        sums: float64 [R, 3] for each row block: Σ|w|, Σw² and Σ|w| of the weights that stay.
    """

    def __init__(self, target: Target, file: SourceFile, selection: Selection) -> None:
        super().__init__(target, file, selection)
        self.sums: list[npt.NDArray[np.float64]] = []

    def tally(self, rows: Rows) -> None:
        """Count a row block, and keep its sums."""
        super().tally(rows)
        self.sums.append(rows.stats)


class _CurveJob(_SumsJob[CurveRows], CurveJob):
    """Every β at once."""


class _MeasureJob(_SumsJob[PackedRows], MeasureJob):
    """The β that was asked for."""


def _measure(
    plan: PruningPlan,
    workers: Workers,
    files: OpenFiles,
    shard_plans: Sequence[ShardPlan],
    kind: type[_CurveJob] | type[_MeasureJob],
) -> tuple[list[_CurveJob | _MeasureJob], list[MeasureRestJob], StandingOut]:
    """Read all that would be packed.

    Returns:
        The jobs on targets, done, those on other tensors, and the rows that stand out.
    """
    jobs: list[_CurveJob | _MeasureJob] = []
    rest: list[MeasureRestJob] = []
    standing_out = StandingOut()
    plans = {shard_plan.shard.name: shard_plan for shard_plan in shard_plans}

    def pieces(shard: Shard, selection: Selection) -> Iterator[Piece]:
        file = files.file(shard)
        for target in plan.targets[shard.name]:
            job = kind(target, file, selection)
            jobs.append(job)
            yield from job.pieces()
            yield Piece.note(partial(_look, standing_out, job))
        for entry, geometry in plans[shard.name].rest_entries:
            rest.append(MeasureRestJob(entry, geometry, file))
            yield from rest[-1].pieces()
        yield Piece.note(partial(files.done, shard))

    shards = [shard_plan.shard for shard_plan in shard_plans]
    nbytes = plan.bytes_to_prune(shards) + sum(shard_plan.rest_bytes for shard_plan in shard_plans)
    stage = Stage(name="measuring", nbytes=nbytes, shards=shards, files=files, pieces=pieces)
    run_stage(plan, workers, stage)
    return jobs, rest, standing_out


def _plans_to_measure(plan: PruningPlan) -> list[ShardPlan]:
    """The plans of the packed shards that have something to measure."""
    plans = [_shard_plan(plan, shard, "packed") for shard in plan.checkpoint.shards]
    return [shard_plan for shard_plan in plans if shard_plan.targets or shard_plan.rest]


def _shard_plan(plan: PruningPlan, shard: Shard, output_format: OutputFormat) -> ShardPlan:
    options = replace(plan.options, output_format=output_format)
    return ShardPlan.make(shard, plan.targets[shard.name], options)


def _spans(shard_plan: ShardPlan) -> Iterator[Span]:
    """What is read of a shard, in order."""
    for target in shard_plan.targets.values():
        yield from target_spans(target)
    for entry, geometry in shard_plan.rest_entries:
        yield from rest_spans(shard_plan.shard, entry, geometry)


def _report_files(report: Report, plan: PruningPlan) -> None:
    """Add the sizes of the files that would be written to a report."""
    packed, dense = _file_sizes(report, plan, "packed"), _file_sizes(report, plan, "dense")
    report["files"] = {name: {"bytes": nbytes} for name, nbytes in packed.items()}
    before = [shard.header.file_size for shard in plan.checkpoint.shards]
    report["totals"]["files"] = file_totals(before, packed.values(), dense.values())


def _file_sizes(report: Report, plan: PruningPlan, output_format: OutputFormat) -> dict[str, int]:
    """Bytes of the files of weights that would be written, by name."""
    after: Literal["bytes_after", "bytes_before"] = (
        "bytes_after" if output_format == "packed" else "bytes_before"
    )
    sizes = {}
    for shard in plan.checkpoint.shards:
        shard_plan = _shard_plan(plan, shard, output_format)
        header = len(encode_header(shard_plan.entries_at_most(), shard.header.metadata))
        data = sum(report["tensors"][entry.name][after] for entry in shard_plan.entries)
        sizes[output_name(plan.checkpoint, shard)] = header + data
    return sizes


def _look(standing_out: StandingOut, job: _CurveJob | _MeasureJob) -> None:
    geometry = job.target.geometry
    standing_out.look(job.target.name, geometry.columns, np.concatenate(job.sums))
    job.sums.clear()
