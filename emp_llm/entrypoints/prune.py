"""The straight line: a checkpoint in, a pruned checkpoint out, and no model in between.

    source → open → decide targets → select → shards: pack and copy → config, index, card, report

Where scores come from data, `emp_llm.calibration` has decided before any shard is written.

Every shard of the source becomes one shard of the same name; no more than a few blocks of rows
are in memory at any time. Shards of the Hub are pruned as they arrive: `files` waits for them.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from emp_llm.calibration.option_checks import check_options
from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.checkpoint.safetensors_header import read_header
from emp_llm.checkpoint.shard import Shard
from emp_llm.errors import CheckpointError, FormatError, OptionError, OutputError
from emp_llm.files.checksum import hash_name
from emp_llm.files.direct_file import Flusher
from emp_llm.hub.source import Source, find_source
from emp_llm.options import PruneOptions, needs_masks
from emp_llm.output.journal import Journal, describe_run
from emp_llm.output.meta_llama_files import write_original_files
from emp_llm.output.output_folder import OutputFolder
from emp_llm.output.sidecar_files import copy_small_files, write_config, write_index
from emp_llm.pruning.copy_job import CopyJob
from emp_llm.pruning.planned_run import PlannedRun, origin
from emp_llm.pruning.shard_plan import ShardPlan, output_name
from emp_llm.pruning.shard_writer import ShardWriter
from emp_llm.pruning.target_jobs import TargetJob
from emp_llm.report.card.card import write_card
from emp_llm.report.card.figure import write_figure
from emp_llm.report.file import write_report
from emp_llm.report.file_names import CARD_NAME
from emp_llm.report.folder_files import describe_files
from emp_llm.report.report import Calibrated, Outcome
from emp_llm.rule_fields import rule_fields
from emp_llm.runtime.devices import asked_devices
from emp_llm.runtime.launcher import meeting_of
from emp_llm.runtime.pipeline import Piece, thread_count
from emp_llm.runtime.progress import Progress, SharedProgress, Silent
from emp_llm.runtime.team import Team, join_team
from emp_llm.selection.mask_store import MaskStore
from emp_llm.selection.selection import Selection
from emp_llm.selection.stored_selection import GivenSelection
from emp_llm.tensors.packed import quantization_config
from emp_llm.verification.tensor_checks import shard_checks

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
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    distributed: bool = False,
) -> dict[str, Any]:
    """Prune a checkpoint by Effective Model Pruning (arXiv 2509.25606) and write the result.

    Args:
        model: A folder, or a model of the Hugging Face Hub.
        out: The folder to write. It holds a whole checkpoint afterwards or, after an error,
            nothing of it, save for the shards that were finished if the same call may yet succeed:
            hidden there, they are taken up by it.
        options: What to prune, and how; the paper's choice by default.
        revision: Branch, tag or commit of a model of the Hub.
        token: Token for the Hub; by default the one that is logged in.
        discard_source: Whether to delete each shard that this run downloads once it is pruned, so
            that no more than two are on disk at once. What was in the Hub's cache before stays,
            and so does what a run that fails has downloaded.
        overwrite: Whether to replace a checkpoint in `out`.
        device: Where the kernels run: ``cpu``, ``cuda`` (all GPUs of this machine, which share the
            blocks), ``cuda:N``, or ``auto``: GPUs where they make the run faster, see
            `emp_llm.runtime.gpu_gain.seconds_saved`. The result is the same. Scores from data have
            a device of their own, see `CalibrationOptions`.
        threads: Threads that compute and write; by default all cores, or 3 to 8 for each GPU. The
            result is the same.
        progress: Told how the work goes on; with `distributed`, on the first rank of all.
        distributed: Whether this is one of the processes that torchrun, ``accelerate launch`` or
            srun started to prune together, each its share of the shards. All of them make the
            same call, with an `out` that they share.

    Returns:
        The report, as in the result's ``emp_report.json``.

    Raises:
        CheckpointError: If the source is no checkpoint that can be pruned; HubError if it cannot
            be fetched.
        OptionError: If `discard_source` is asked for with a local folder, or with granularity
            `model`, a target sparsity or scores from data, for which all shards are read before
            the first is pruned; if no β gives the target sparsity; if the kernels have no such
            device to run on; or as `emp_llm.calibration.option_checks` does.
        OutputError: If `out` cannot be written, or holds an unfinished run that differs.
        DeviceError: If a GPU has no room for the work.
        RankError: If another of the processes failed.
    """
    options = options or PruneOptions()
    check_options(options)
    _check_discarding(discard_source, options)
    told = SharedProgress(progress or Silent())
    with join_team(meeting_of(os.environ) if distributed else None) as team:
        devices = asked_devices(device, team)
        source, checkpoint = _open(team, model, revision, token, discard_source, told)
        came_from = origin(model, source)
        folder = OutputFolder(
            Path(out),
            overwrite=overwrite,
            source=source.folder,
            run=describe_run(checkpoint, options, came_from),
        )
        with folder if team.leads else folder.explaining(), team.working():
            _see(folder, team)
            run = _PruneRun(
                source, checkpoint, options, thread_count(threads, team.local_size), told, team
            )
            run.take_devices(devices, threads)
            run.find_beta(folder.staging)
            run.search_beta(folder.journal)
            run.write(folder.staging, folder.journal)
            return team.share(lambda: run.publish(folder, came_from))


def _check_discarding(discard_source: bool, options: PruneOptions) -> None:
    """Refuse to delete shards that are read again."""
    if discard_source and (needs_masks(options) or options.max_loss_increase is not None):
        raise OptionError(
            "discard_source: scores from data and repair, and a search for β, read the source "
            "twice, before the first shard is pruned and after: leave it out"
        )
    together, sought = options.granularity == "model", options.target_sparsity is not None
    if not discard_source or not (together or sought):
        return
    what, instead = (
        ("granularity 'model' ranks all weights together", "choose granularity 'row' or 'layer'")
        if together
        else ("target_sparsity finds β from all weights", "give the β that inspect finds")
    )
    raise OptionError(
        f"discard_source: {what} and needs all shards before the first is pruned: leave it out, or "
        f"{instead}"
    )


def _open(
    team: Team,
    model: str | os.PathLike[str],
    revision: str | None,
    token: str | bool | None,
    discard: bool,
    told: SharedProgress,
) -> tuple[Source, Checkpoint]:
    """Find and open the source, the same commit on all ranks."""

    def find(revision: str | None) -> Source:
        return find_source(model, revision=revision, token=token, discard=discard, progress=told)

    with team.working():
        first = find(revision) if team.leads else None
        commit = team.share(lambda: first.revision if first else None)
        source = first or find(commit)
        return source, source.open_checkpoint()


def _see(folder: OutputFolder, team: Team) -> None:
    """See that all ranks write to the folder that the first one made."""
    if team.share(folder.journal.run) != folder.journal.run():
        raise OutputError(
            f"{folder.path}: rank {team.rank} does not see what rank 0 wrote there: give a folder "
            "that all machines share, by its whole path"
        )


class _PruneRun(PlannedRun):
    """One checkpoint being pruned."""

    _tried: Sequence[Mapping[str, Any]] = ()

    def write(self, folder: Path, journal: Journal) -> None:
        """Write this rank's part of the shards that are not finished yet, and wait for the rest."""
        if self.team.leads:
            write_original_files(folder, self.checkpoint)
        finished = set(self._check_finished(folder, journal))
        left = [shard for shard in self.checkpoint.shards if self._name(shard) not in finished]
        shards = self.share_of(left, lambda shard: shard.header.file_size)
        surveyed = self.surveyed()
        with ExitStack() as stack:
            given = self._decided(journal.decisions, stack)
            needed = [s for s in self.checkpoint.shards if s in shards or s in surveyed]
            files = stack.enter_context(self.source.files(needed))
            writers = stack.enter_context(ExitStack())
            flusher = stack.enter_context(Flusher())
            write = partial(self._writing, files, folder, journal, flusher, writers)
            nbytes = sum(entry.nbytes for shard in left for entry in shard.header.tensors)
            self.run(f"pruning{self.devices.told}", nbytes, shards, files, write, given)
        self.team.gather(None)

    def search_beta(self, journal: Journal) -> None:
        """Have the first rank search for the β that a loss allows, if that is asked for."""
        if self.options.max_loss_increase is None:
            return

        def search() -> tuple[float, list[dict[str, Any]]]:
            from emp_llm.calibration.beta_search import search_beta

            with MaskStore(journal.decisions) as store:
                return search_beta(self, store)

        beta, self._tried = self.team.share(search)
        self.options = replace(self.options, beta=beta)

    def _decided(self, folder: Path, stack: ExitStack) -> Selection | None:
        """Have the first rank decide by data what stays, if that is asked for."""
        if not needs_masks(self.options):
            return None

        def decide() -> float:
            from emp_llm.calibration.calibrate import calibrate

            with MaskStore(folder) as store:
                calibrate(self, store)
            return self.options.beta  # which may have been found by the scores

        self.options = replace(self.options, beta=self.team.share(decide))
        return GivenSelection(self.options, stack.enter_context(MaskStore(folder)))

    def publish(self, folder: OutputFolder, origin: dict[str, Any]) -> dict[str, Any]:
        """Write what goes beside the shards, and put all of it in its place; returns the report."""
        staging = folder.staging
        write_index(staging, self.checkpoint)
        calibrated = Calibrated()
        if needs_masks(self.options):
            with MaskStore(folder.journal.decisions) as store:
                calibrated = store.calibrated()
        packed = self.options.output_format == "packed"
        rule = rule_fields(self.options, calibrated.data)
        method = quantization_config(rule) if packed else None
        write_config(staging, self.checkpoint, method)
        copy_small_files(staging, self.checkpoint)
        outcomes: dict[str, Outcome] = {}
        for shard in self.checkpoint.shards:
            outcomes |= self._outcomes(folder.journal, self._name(shard))
        report = self.report(outcomes, origin, calibrated)
        if self._tried:
            report["search"] = list(self._tried)
        report["files"] = describe_files(staging)
        write_report(staging, report)
        write_figure(staging, report)
        write_card(staging / CARD_NAME, self.source.folder / CARD_NAME, report)
        folder.publish()
        return report

    def _outcomes(self, journal: Journal, name: str) -> dict[str, Outcome]:
        outcomes = journal.outcomes(name)
        if outcomes is None:  # such as of another machine's, on a file system that shows it late
            raise OutputError(
                f"{name}: was finished, and its journal cannot be read or tells otherwise: run the "
                "command again"
            )
        return outcomes

    def _name(self, shard: Shard) -> str:
        return output_name(self.checkpoint, shard)

    def _check_finished(self, folder: Path, journal: Journal) -> list[str]:
        """Which files an earlier run has finished; what is not as it was written is forgotten."""
        sizes = self.team.share(
            lambda: {name: (folder / name).stat().st_size for name in journal.finished()}
        )
        shards = [shard for shard in self.checkpoint.shards if self._name(shard) in sizes]
        if not shards:
            return []
        self.progress.begin("checking", sum(sizes.values()))
        damaged = []
        for shard in self.share_of(shards, lambda shard: sizes[self._name(shard)]):
            if not self._is_sound(folder, journal, shard):
                damaged.append(self._name(shard))
                journal.forget(self._name(shard))
        lost = {name for part in self.team.gather(damaged) for name in part}
        return [self._name(shard) for shard in shards if self._name(shard) not in lost]

    def _is_sound(self, folder: Path, journal: Journal, shard: Shard) -> bool:
        name = self._name(shard)
        outcomes = journal.outcomes(name)
        if outcomes is None or outcomes.keys() != {e.name for e in shard.header.tensors}:
            return False
        fields = {
            name: self.tensor_report(name, outcome).to_dict() for name, outcome in outcomes.items()
        }
        try:
            written = Shard(name, folder / name, read_header(folder / name))
            with OpenFiles() as files:
                checks = shard_checks(written, files.file(written), fields)
                self.run_pieces(chain.from_iterable(check.pieces() for check in checks), files)
        except (CheckpointError, FormatError):
            return False
        return True

    def _writing(
        self,
        files: OpenFiles,
        folder: Path,
        journal: Journal,
        flusher: Flusher,
        writers: ExitStack,
        shard: Shard,
        selection: Selection,
    ) -> Iterator[Piece]:
        plan = ShardPlan.make(shard, self.targets[shard.name], self.options.output_format)
        jobs: list[TargetJob | CopyJob] = []
        writer = ShardWriter(
            folder / self._name(shard),
            plan.entries_at_most(),
            shard.header.metadata,
            flusher,
            in_order=plan.in_order,
            finished=partial(self._record, journal, shard, jobs),
        )
        writers.callback(writer.release)
        for job in plan.jobs(files.file(shard), selection, writer):
            jobs.append(job)
            yield from job.pieces()
        yield Piece.note(writer.close_when_written)
        yield Piece.note(partial(files.done, shard))

    def _record(self, journal: Journal, shard: Shard, jobs: Sequence[TargetJob | CopyJob]) -> None:
        outcomes = {
            job.entry.name: Outcome(
                job.figures if isinstance(job, TargetJob) else None, hash_name(job.checksum)
            )
            for job in jobs
        }
        journal.record(self._name(shard), outcomes)
