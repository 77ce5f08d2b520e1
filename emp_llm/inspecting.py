"""What pruning would do to a checkpoint, found in one pass over its weights; nothing is written."""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

from emp_llm.checkpoint import Shard
from emp_llm.files import OpenFiles
from emp_llm.hub import find_source
from emp_llm.options import PruneOptions
from emp_llm.pipeline import Piece, thread_count
from emp_llm.planned_run import PlannedRun, origin
from emp_llm.progress import Progress, SharedProgress, Silent
from emp_llm.prune_steps import MeasureJob
from emp_llm.report import Outcome
from emp_llm.selection import Selection

__all__ = ["inspect"]


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
    run = _InspectRun(source, source.open_checkpoint(), options, thread_count(threads), told)
    return run.measure(origin(model, source))


class _InspectRun(PlannedRun):
    """One checkpoint being inspected."""

    def measure(self, origin: dict[str, Any]) -> dict[str, Any]:
        """Read all targets; returns the report."""
        shards = [shard for shard in self.checkpoint.shards if self.targets[shard.name]]
        jobs: list[MeasureJob] = []
        with self.source.files(shards) as files:
            measure = partial(self._measuring, files, jobs)
            self.run("measuring", self.bytes_to_prune(shards), shards, files, measure)
        return self.report({job.entry.name: Outcome(job.figures) for job in jobs}, origin)

    def _measuring(
        self, files: OpenFiles, jobs: list[MeasureJob], shard: Shard, selection: Selection
    ) -> Iterator[Piece]:
        for target in self.targets[shard.name]:
            job = MeasureJob(target, files.file(shard), selection)
            jobs.append(job)
            yield from job.pieces()
        yield Piece.note(partial(files.done, shard))
