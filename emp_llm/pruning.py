"""The straight line: a checkpoint in, a pruned checkpoint out, and no model in between.

    source → open → decide targets → select → shards: pack and copy → config, index, card, report

Every shard of the source becomes one shard of the same name; no more than a few blocks of rows
are in memory at any time. Shards of the Hub are pruned as they arrive: `files` waits for them.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from emp_kernels.dispatch import load_backend

from emp_llm.card import write_card
from emp_llm.checkpoint import Checkpoint, Shard
from emp_llm.companions import (
    CARD_NAME,
    REPORT_NAME,
    copy_small_files,
    write_config,
    write_index,
    write_json,
)
from emp_llm.disk_file import Flusher
from emp_llm.errors import OptionError
from emp_llm.files import OpenFiles
from emp_llm.hub import Source, find_source
from emp_llm.options import PruneOptions
from emp_llm.output_folder import OutputFolder
from emp_llm.packed import check_names, quantization_config
from emp_llm.pipeline import Piece, run_pieces, thread_count
from emp_llm.progress import Progress, SharedProgress, Silent
from emp_llm.prune_steps import CopyJob, MeasureJob, TargetJob, hash_name
from emp_llm.report import TensorReport, build_report, rule_fields
from emp_llm.selection import Selection, passes, select
from emp_llm.shard_plan import ShardPlan, output_name
from emp_llm.shard_writer import ShardWriter
from emp_llm.target import Target
from emp_llm.targets_apart import TargetsQuestion
from emp_llm.written_files import describe_files

__all__ = ["inspect", "prune"]


def prune(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: PruneOptions | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    discard_source: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prune a checkpoint by Effective Model Pruning (arXiv 2509.25606) and write the result.

    Args:
        model: A folder, or a model of the Hugging Face Hub.
        out: The folder to write. It holds a whole checkpoint afterwards or, after an error,
            nothing of it.
        options: What to prune, and how; the paper's choice by default.
        revision: Branch, tag or commit of a model of the Hub.
        token: Token for the Hub; by default the one that is logged in.
        discard_source: Whether to delete each shard that this run downloads once it is pruned, so
            that no more than two are on disk at once. What was in the Hub's cache before stays,
            and so does what a run that fails has downloaded.
        overwrite: Whether to replace a checkpoint in `out`.
        threads: Threads that compute and write; all cores by default. The result is the same.
        progress: Told how the work goes on.

    Returns:
        The report, as in the result's ``emp_report.json``.

    Raises:
        CheckpointError: If the source is no checkpoint that can be pruned; HubError if it cannot
            be fetched.
        OptionError: If `discard_source` is asked for with a local folder, or with granularity
            `model`, which reads all shards before it prunes the first.
        OutputError: If `out` cannot be written.
    """
    options = options or PruneOptions()
    if discard_source and options.granularity == "model":
        raise OptionError(
            "discard_source: granularity 'model' ranks all weights together and needs all shards "
            "before the first is pruned: leave it out, or choose granularity 'row' or 'layer'"
        )
    told = SharedProgress(progress or Silent())
    source = find_source(
        model, revision=revision, token=token, discard=discard_source, progress=told
    )
    checkpoint = source.open_checkpoint()
    with OutputFolder(Path(out), overwrite=overwrite, source=source.folder) as folder:
        run = _Run(source, checkpoint, options, thread_count(threads), told)
        report = run.write(folder.staging, _origin(model, source))
        report["files"] = describe_files(folder.staging)
        write_json(folder.staging / REPORT_NAME, report)
        write_card(folder.staging / CARD_NAME, source.folder / CARD_NAME, report)
        folder.publish()
    return report


def inspect(
    model: str | os.PathLike[str],
    options: PruneOptions | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Find what `prune` would do, reading all targets and writing nothing.

    Arguments and errors are those of `prune`. The sizes are the ones that packing would give.

    Returns:
        The report that `prune` would write, without checksums.
    """
    options = options or PruneOptions()
    told = SharedProgress(progress or Silent())
    source = find_source(model, revision=revision, token=token, progress=told)
    run = _Run(source, source.open_checkpoint(), options, thread_count(threads), told)
    return run.measure(_origin(model, source))


def _origin(model: str | os.PathLike[str], source: Source) -> dict[str, Any]:
    """Where a model came from; of a local one no more than its name, to give nothing away."""
    name = source.repo_id or Path(model).resolve().name
    return {"model": name, "revision": source.revision}


class _Run:
    """One checkpoint being pruned."""

    def __init__(
        self,
        source: Source,
        checkpoint: Checkpoint,
        options: PruneOptions,
        threads: int,
        progress: SharedProgress,
    ) -> None:
        self._source = source
        self._checkpoint = checkpoint
        self._options = options
        self._threads = threads
        self._progress = progress
        if options.output_format == "packed":
            check_names(checkpoint.tensors)
        with TargetsQuestion(
            checkpoint.folder,
            {name: (entry.dtype, entry.shape) for name, (_, entry) in checkpoint.tensors.items()},
            targets=options.targets,
            ignore=options.ignore,
        ) as question:
            load_backend()
            self._decisions = question.answer()
        self._targets = {
            shard.name: [
                Target.of(shard, entry, transposed=self._decisions[entry.name].transposed)
                for entry in shard.header.tensors
                if self._decisions[entry.name].prune
            ]
            for shard in checkpoint.shards
        }
        self._jobs: list[TargetJob | CopyJob] = []

    def measure(self, origin: dict[str, Any]) -> dict[str, Any]:
        """Read all targets; returns the report."""
        shards = [shard for shard in self._checkpoint.shards if self._targets[shard.name]]
        with self._source.files(shards) as files:
            measure = partial(self._measuring, files)
            self._run("measuring", self._target_bytes, shards, files, measure)
        return self._report({}, origin)

    def write(self, folder: Path, origin: dict[str, Any]) -> dict[str, Any]:
        """Write all files but card and report to a folder; returns the report."""
        shards = self._checkpoint.shards
        with ExitStack() as stack:
            files = stack.enter_context(self._source.files(shards))
            writers = stack.enter_context(ExitStack())
            flusher = stack.enter_context(Flusher())
            write = partial(self._writing, files, folder, flusher, writers)
            self._run("pruning", self._checkpoint.nbytes, shards, files, write)
        write_index(folder, self._checkpoint)
        packed = self._options.output_format == "packed"
        method = quantization_config(rule_fields(self._options)) if packed else None
        write_config(folder, self._checkpoint, method)
        copy_small_files(folder, self._checkpoint)
        checksums = {job.entry.name: hash_name(job.checksum) for job in self._jobs}
        return self._report(checksums, origin)

    @property
    def _target_bytes(self) -> int:
        return sum(target.entry.nbytes for part in self._targets.values() for target in part)

    def _run(
        self,
        stage: str,
        nbytes: int,
        shards: Sequence[Shard],
        files: OpenFiles,
        work: Callable[[Shard, Selection], Iterator[Piece]],
    ) -> None:
        """Select what stays in these shards, and do the work on so many bytes of them."""
        to_select = self._target_bytes * passes(self._options)
        if self._options.granularity == "layer":  # decided shard by shard, as they arrive
            self._progress.begin(stage, to_select + nbytes)
            for shard in shards:
                self._run_pieces(work(shard, self._select([shard], files)), files)
            return
        if to_select:
            self._progress.begin("selecting", to_select)
        selection = self._select(shards, files)
        self._progress.begin(stage, nbytes)
        self._run_pieces(chain.from_iterable(work(shard, selection) for shard in shards), files)

    def _select(self, shards: Iterable[Shard], files: OpenFiles) -> Selection:
        targets = [target for shard in shards for target in self._targets[shard.name]]
        left = sum(target.entry.nbytes for target in targets) * passes(self._options)

        def advance(nbytes: int) -> None:
            nonlocal left
            counted = min(nbytes, left)
            left -= counted
            self._progress.advance(counted)

        selection = select(targets, self._options, files, threads=self._threads, progress=advance)
        if left:  # most blocks need not be read as often as was allowed for
            self._progress.advance(left)
        return selection

    def _run_pieces(self, pieces: Iterator[Piece], files: OpenFiles) -> None:
        run_pieces(
            pieces,
            threads=self._threads,
            progress=self._progress.advance,
            abandon=files.abandon,
        )

    def _measuring(self, files: OpenFiles, shard: Shard, selection: Selection) -> Iterator[Piece]:
        for target in self._targets[shard.name]:
            job = MeasureJob(target, files.file(shard), selection)
            self._jobs.append(job)
            yield from job.pieces()
        yield Piece.note(partial(files.done, shard))

    def _writing(
        self,
        files: OpenFiles,
        folder: Path,
        flusher: Flusher,
        writers: ExitStack,
        shard: Shard,
        selection: Selection,
    ) -> Iterator[Piece]:
        plan = ShardPlan.make(shard, self._targets[shard.name], self._options.output_format)
        path = folder / output_name(self._checkpoint, shard)
        file = files.file(shard)
        writer = ShardWriter(
            path,
            plan.entries_at_most(),
            shard.header.metadata,
            flusher,
            in_order=plan.in_order,
        )
        writers.callback(writer.release)
        for job in plan.jobs(file, selection, writer):
            self._jobs.append(job)
            yield from job.pieces()
        yield Piece.note(writer.close_when_written)
        yield Piece.note(partial(files.done, shard))

    def _report(self, checksums: Mapping[str, str], origin: dict[str, Any]) -> dict[str, Any]:
        figures = {job.entry.name: job.figures for job in self._jobs if isinstance(job, TargetJob)}
        tensors = [
            TensorReport(
                entry=entry,
                decision=self._decisions[name],
                figures=figures.get(name),
                checksum=checksums.get(name),
            )
            for name, (_, entry) in self._checkpoint.tensors.items()
        ]
        return build_report(tensors, self._options, origin)
