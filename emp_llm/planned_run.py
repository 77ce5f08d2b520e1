"""A checkpoint whose targets are known: what pruning it and inspecting it have in common.

source → open → decide targets → select → shards: pieces of work → report
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from emp_kernels.dispatch import load_backend

from emp_llm.checkpoint import Checkpoint, Shard
from emp_llm.files import OpenFiles
from emp_llm.hub import Source
from emp_llm.options import PruneOptions
from emp_llm.packed import check_names
from emp_llm.pipeline import Piece, run_pieces
from emp_llm.progress import SharedProgress
from emp_llm.prune_steps import CopyJob, TargetJob
from emp_llm.report import TensorReport, build_report
from emp_llm.selection import Selection, passes, select
from emp_llm.target import Target
from emp_llm.targets_apart import TargetsQuestion

__all__ = ["PlannedRun", "origin"]


def origin(model: str | os.PathLike[str], source: Source) -> dict[str, Any]:
    """Where a model came from; of a local one no more than its name, to give nothing away."""
    name = source.repo_id or Path(model).resolve().name
    return {"model": name, "revision": source.revision}


class PlannedRun:
    """Work on the targets of one checkpoint.

    Args:
        source: Where the checkpoint lies.
        checkpoint: What it holds.
        options: What is asked for.
        threads: Threads that compute.
        progress: Told how the work goes on.

    Attributes:
        decisions: Of every tensor, by name.
        targets: Those that are pruned, by the name of their shard.
        jobs: Work that was begun; `report` takes its figures from it.

    Raises:
        CheckpointError: If the checkpoint is none that can be pruned.
    """

    def __init__(
        self,
        source: Source,
        checkpoint: Checkpoint,
        options: PruneOptions,
        threads: int,
        progress: SharedProgress,
    ) -> None:
        self.source = source
        self.checkpoint = checkpoint
        self.options = options
        self.jobs: list[TargetJob | CopyJob] = []
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
            self.decisions = question.answer()
        self.targets = {
            shard.name: [
                Target.of(shard, entry, transposed=self.decisions[entry.name].transposed)
                for entry in shard.header.tensors
                if self.decisions[entry.name].prune
            ]
            for shard in checkpoint.shards
        }

    @property
    def target_bytes(self) -> int:
        """Bytes of all targets."""
        return sum(target.entry.nbytes for part in self.targets.values() for target in part)

    def run(
        self,
        stage: str,
        nbytes: int,
        shards: Sequence[Shard],
        files: OpenFiles,
        work: Callable[[Shard, Selection], Iterator[Piece]],
    ) -> None:
        """Select what stays in these shards, and do the work on so many bytes of them."""
        to_select = self.target_bytes * passes(self.options)
        if self.options.granularity == "layer":  # decided shard by shard, as they arrive
            self._progress.begin(stage, to_select + nbytes)
            for shard in shards:
                self._run_pieces(work(shard, self._select([shard], files)), files)
            return
        if to_select:
            self._progress.begin("selecting", to_select)
        selection = self._select(shards, files)
        self._progress.begin(stage, nbytes)
        self._run_pieces(chain.from_iterable(work(shard, selection) for shard in shards), files)

    def report(self, checksums: Mapping[str, str], origin: dict[str, Any]) -> dict[str, Any]:
        """The report.

        Args:
            checksums: Of every tensor that was written.
            origin: Name and revision of the model.
        """
        figures = {job.entry.name: job.figures for job in self.jobs if isinstance(job, TargetJob)}
        tensors = [
            TensorReport(
                entry=entry,
                decision=self.decisions[name],
                figures=figures.get(name),
                checksum=checksums.get(name),
            )
            for name, (_, entry) in self.checkpoint.tensors.items()
        ]
        return build_report(tensors, self.options, origin)

    def _select(self, shards: Iterable[Shard], files: OpenFiles) -> Selection:
        targets = [target for shard in shards for target in self.targets[shard.name]]
        left = sum(target.entry.nbytes for target in targets) * passes(self.options)

        def advance(nbytes: int) -> None:
            nonlocal left
            counted = min(nbytes, left)
            left -= counted
            self._progress.advance(counted)

        selection = select(targets, self.options, files, threads=self._threads, progress=advance)
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
