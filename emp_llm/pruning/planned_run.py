"""A checkpoint whose targets are known: what pruning it and inspecting it have in common.

source → open → decide targets → select → shards: pieces of work → report
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any

from emp_kernels.dispatch import load_backend

from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.shard import Shard
from emp_llm.hub.source import Source
from emp_llm.options import PruneOptions, counts_magnitudes, needs_masks
from emp_llm.report.report import Calibrated, Outcome, TensorReport, build_report
from emp_llm.runtime.devices import CPU, Devices, worthwhile_devices
from emp_llm.runtime.gpu_gain import Work
from emp_llm.runtime.pipeline import Piece, run_pieces, thread_count
from emp_llm.runtime.progress import SharedProgress
from emp_llm.runtime.team import Team
from emp_llm.selection.row_block_pass import RowBlockPass
from emp_llm.selection.selection import Selection, SharedGroup, passes, select
from emp_llm.selection.target_sparsity import find_beta
from emp_llm.structure.targets import TargetDecision
from emp_llm.structure.targets_process import TargetsQuestion
from emp_llm.tensors.packed import check_names
from emp_llm.tensors.target import Target

__all__ = ["PlannedRun", "origin"]


def origin(model: str | os.PathLike[str], source: Source) -> dict[str, Any]:
    """Where a model came from; of a local one no more than its name, to give nothing away."""
    name = source.repo_id or Path(model).resolve().name
    return {"model": name, "revision": source.revision}


class PlannedRun:
    """Work on the targets of one checkpoint.

    Args:
        source: Where the checkpoint lies.
        checkpoint: What it holds. Where a file has tied tensors, which are the same bytes under two
            names, only the one that the other is tied to is taken.
        options: What is asked for.
        threads: Threads that compute.
        progress: Told how the work goes on.
        team: The processes that take part.

    Attributes:
        threads: Threads that compute.
        devices: What their kernels work on.
        decisions: Of every tensor, by name.
        targets: Those that are pruned, by the name of their shard.

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
        team: Team | None = None,
    ) -> None:
        self.source = source
        self.options = options
        self.threads = threads
        self.devices = CPU
        self.progress = progress
        self.team = team or Team()
        self.team.tell_progress(progress.advance)
        if options.output_format == "packed":
            check_names(checkpoint.tensors)
        self.checkpoint = checkpoint
        self.decisions = self._decide()
        self.checkpoint = checkpoint.without(_stored_twice(checkpoint, self.decisions))
        self.targets = {
            shard.name: [
                Target.of(shard, entry, transposed=self.decisions[entry.name].transposed)
                for entry in shard.header.tensors
                if self.decisions[entry.name].prune
            ]
            for shard in self.checkpoint.shards
        }

    def take_devices(self, devices: Devices | None, threads: int | None) -> None:
        """Work on devices, as a user asked for them and for threads.

        Args:
            devices: None for GPUs where they make the run faster, and there are some.
            threads: As for `thread_count`.
        """
        processes = self.team.local_size
        if devices is None:
            own = self.share_of(self.checkpoint.shards, lambda shard: shard.header.file_size)
            work = Work(
                kernel="pack" if self.options.output_format == "packed" else "prune",
                # what comes over a network is not worth a GPU
                nbytes=0 if self.source.to_come else self.bytes_to_prune(own),
                cores=min(self.threads, thread_count(None, processes)),
                processes=processes,
            )
            devices = worthwhile_devices(work, self.team)
        self.devices = devices
        self.threads = thread_count(threads, processes, len(devices.gpus))

    def bytes_to_prune(self, shards: Iterable[Shard]) -> int:
        """Bytes of the targets in these shards."""
        return sum(target.entry.nbytes for shard in shards for target in self.targets[shard.name])

    def find_beta(self, scratch: Path | None = None) -> None:
        """Take the β that the options ask to be found, where the weights alone tell it.

        Args:
            scratch: A folder for what does not fit into memory; None for the usual one.

        Raises:
            OptionError: If no β prunes as much as was asked for, or as little.
        """
        options, team = self.options, self.team
        if options.target_sparsity is None or not counts_magnitudes(options):
            return
        shards = self._part_of_targets()
        weights = sum(math.prod(t.entry.shape) for t in self._targets_of(self.checkpoint.shards))
        with self.source.files(shards) as files, team.stopping(files.abandon):
            self.progress.begin("finding β", self.bytes_to_prune(self.checkpoint.shards))
            beta = find_beta(
                self._targets_of(shards),
                options.target_sparsity,
                options.granularity,
                RowBlockPass(files, self.threads, self._advance, self.devices),
                weights=weights,
                team=team,
                scratch=scratch,
            )
        self.options = replace(options, beta=beta)

    def run(
        self,
        stage: str,
        nbytes: int,
        shards: Sequence[Shard],
        files: OpenFiles,
        work: Callable[[Shard, Selection], Iterator[Piece]],
        given: Selection | None = None,
    ) -> None:
        """Select what stays in these shards, and do the work on them.

        Args:
            stage: What the work is called.
            nbytes: Bytes of it, on all ranks together.
            shards: What this rank works on.
            files: Their files, and of all that `surveyed` tells.
            work: Makes the pieces of a shard.
            given: What stays, where that was decided before.
        """
        with self.team.stopping(files.abandon):
            if (
                given is None and self.options.granularity == "layer"
            ):  # decided shard by shard, as they arrive
                to_select = passes(self.options) * self.bytes_to_prune(self.checkpoint.shards)
                self.progress.begin(stage, to_select + nbytes)
                for shard in shards:
                    selection = self.select(self.targets[shard.name], files)
                    self.run_pieces(work(shard, selection), files)
                return
            selection = given or self._select_together(files)
            self.progress.begin(stage, nbytes)
            self.run_pieces(chain.from_iterable(work(shard, selection) for shard in shards), files)

    def select(
        self, targets: Sequence[Target], files: OpenFiles, shared: SharedGroup | None = None
    ) -> Selection:
        """Select what stays in some targets, `passes` times whose bytes progress is told of.

        Args:
            targets: The targets.
            files: Their files.
            shared: As for `emp_llm.selection.selection.select`.
        """
        left = passes(self.options) * sum(target.entry.nbytes for target in targets)

        def advance(nbytes: int) -> None:
            nonlocal left
            counted = min(nbytes, left)
            left -= counted
            self._advance(counted)

        selection = select(
            targets,
            self.options,
            files,
            threads=self.threads,
            devices=self.devices,
            progress=advance,
            shared=shared,
        )
        if left:  # most blocks need not be read as often as was allowed for
            self._advance(left)
        return selection

    def surveyed(self) -> list[Shard]:
        """The shards that this rank reads to select what stays, before any is worked on."""
        together = self.options.granularity == "model" and not needs_masks(self.options)
        return self._part_of_targets() if together else []

    def share_of(self, shards: Iterable[Shard], nbytes: Callable[[Shard], int]) -> list[Shard]:
        """This rank's part of some shards, in their order.

        The largest is given out first, each to the rank that has the fewest bytes by then.
        """
        shards = list(shards)
        loads, shares = [0] * self.team.size, [set[str]() for _ in range(self.team.size)]
        for shard in sorted(shards, key=lambda shard: (-nbytes(shard), shard.name)):
            rank = loads.index(min(loads))
            loads[rank] += nbytes(shard)
            shares[rank].add(shard.name)
        return [shard for shard in shards if shard.name in shares[self.team.rank]]

    def report(
        self,
        outcomes: Mapping[str, Outcome],
        origin: dict[str, Any],
        calibrated: Calibrated | None = None,
    ) -> dict[str, Any]:
        """The report.

        Args:
            outcomes: Of every tensor that was worked on.
            origin: Name and revision of the model.
            calibrated: What there is to be told of scores from data.
        """
        return build_report(
            (
                self.tensor_report(name, outcomes.get(name, Outcome()))
                for name in self.checkpoint.tensors
            ),
            self.options,
            origin,
            calibrated or Calibrated(),
        )

    def tensor_report(self, name: str, outcome: Outcome) -> TensorReport:
        """The part of the report on one tensor."""
        _, entry = self.checkpoint.tensors[name]
        return TensorReport(entry=entry, decision=self.decisions[name], outcome=outcome)

    def run_pieces(self, pieces: Iterator[Piece], files: OpenFiles) -> None:
        """Do the work of some pieces, and tell of it."""
        run_pieces(
            pieces,
            threads=self.threads,
            devices=self.devices,
            progress=self._advance,
            abandon=files.abandon,
        )

    def _advance(self, nbytes: int) -> None:
        self.team.check(nbytes)
        self.progress.advance(nbytes)

    def _decide(self) -> dict[str, TargetDecision]:
        """Have the first rank decide which tensors are targets."""

        def ask() -> dict[str, dict[str, Any]]:
            tensors = self.checkpoint.tensors.items()
            with TargetsQuestion(
                self.checkpoint.folder,
                {name: (entry.dtype, entry.shape) for name, (_, entry) in tensors},
                targets=self.options.targets,
                ignore=self.options.ignore,
                config=self.checkpoint.config if self.checkpoint.original else None,
            ) as question:
                load_backend()
                return {name: asdict(decision) for name, decision in question.answer().items()}

        if not self.team.leads:
            load_backend()
        return {name: TargetDecision(**fields) for name, fields in self.team.share(ask).items()}

    def _select_together(self, files: OpenFiles) -> Selection:
        """Select what stays in all shards, each rank reading its part of them."""
        own = self._targets_of(self.surveyed())
        everything = self._targets_of(self.checkpoint.shards)
        if to_select := passes(self.options) * self.bytes_to_prune(self.checkpoint.shards):
            self.progress.begin("selecting", to_select)
        return self.select(own, files, SharedGroup(everything, self.team))

    def _part_of_targets(self) -> list[Shard]:
        """This rank's part of the shards, where all targets are read before any is pruned."""
        return self.share_of(self.checkpoint.shards, lambda shard: self.bytes_to_prune([shard]))

    def _targets_of(self, shards: Iterable[Shard]) -> list[Target]:
        return [target for shard in shards for target in self.targets[shard.name]]


def _stored_twice(checkpoint: Checkpoint, decisions: Mapping[str, TargetDecision]) -> list[str]:
    """Tensors that are the very same bytes of a file as those that they are tied to."""

    def bytes_of(name: str) -> tuple[str, int, int]:
        shard, entry = checkpoint.tensors[name]
        return shard.name, entry.start, entry.end

    return [
        name
        for name, decision in decisions.items()
        if decision.tied_to and bytes_of(name) == bytes_of(decision.tied_to)
    ]
