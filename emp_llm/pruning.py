"""The straight line: a checkpoint in, a pruned checkpoint out, and no model in between.

    source → open → decide targets → select → shards: pack and copy → config, index, card, report

Every shard of the source becomes one shard of the same name; no more than a few blocks of rows
are in memory at any time. Shards of the Hub are pruned as they arrive: `files` waits for them.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from emp_llm.card import write_card
from emp_llm.checkpoint import Shard
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
from emp_llm.hub import find_source
from emp_llm.options import PruneOptions
from emp_llm.output_folder import OutputFolder
from emp_llm.packed import quantization_config
from emp_llm.pipeline import Piece, thread_count
from emp_llm.planned_run import PlannedRun, origin
from emp_llm.progress import Progress, SharedProgress, Silent
from emp_llm.prune_steps import hash_name
from emp_llm.report import rule_fields
from emp_llm.selection import Selection
from emp_llm.shard_plan import ShardPlan, output_name
from emp_llm.shard_writer import ShardWriter
from emp_llm.written_files import describe_files

__all__ = ["prune"]


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
        run = _PruneRun(source, checkpoint, options, thread_count(threads), told)
        report = run.write(folder.staging, origin(model, source))
        report["files"] = describe_files(folder.staging)
        write_json(folder.staging / REPORT_NAME, report)
        write_card(folder.staging / CARD_NAME, source.folder / CARD_NAME, report)
        folder.publish()
    return report


class _PruneRun(PlannedRun):
    """One checkpoint being pruned."""

    def write(self, folder: Path, origin: dict[str, Any]) -> dict[str, Any]:
        """Write all files but card and report to a folder; returns the report."""
        shards = self.checkpoint.shards
        with ExitStack() as stack:
            files = stack.enter_context(self.source.files(shards))
            writers = stack.enter_context(ExitStack())
            flusher = stack.enter_context(Flusher())
            write = partial(self._writing, files, folder, flusher, writers)
            self.run("pruning", self.checkpoint.nbytes, shards, files, write)
        write_index(folder, self.checkpoint)
        packed = self.options.output_format == "packed"
        method = quantization_config(rule_fields(self.options)) if packed else None
        write_config(folder, self.checkpoint, method)
        copy_small_files(folder, self.checkpoint)
        checksums = {job.entry.name: hash_name(job.checksum) for job in self.jobs}
        return self.report(checksums, origin)

    def _writing(
        self,
        files: OpenFiles,
        folder: Path,
        flusher: Flusher,
        writers: ExitStack,
        shard: Shard,
        selection: Selection,
    ) -> Iterator[Piece]:
        plan = ShardPlan.make(shard, self.targets[shard.name], self.options.output_format)
        path = folder / output_name(self.checkpoint, shard)
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
            self.jobs.append(job)
            yield from job.pieces()
        yield Piece.note(writer.close_when_written)
        yield Piece.note(partial(files.done, shard))
