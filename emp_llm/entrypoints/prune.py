"""Prune: a checkpoint in, a pruned checkpoint out, and no model in between.

    source → targets → β → what an earlier run finished → masks → shards → config, card, report

With a base, targets are read as differences to it from then on, and nothing else changes.

Masks are decided here only if their scores come from data, or weights are repaired: by
`emp_llm.calibration`, before any shard is written. Masks by magnitude are decided row block by row
block, as the shards are written.

Every shard of the source becomes one shard of the same name; no more than a few row blocks are in
memory at any time. Shards of the Hub are pruned as they arrive: `Source.files` waits for them.
"""

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from emp_llm.calibration.option_checks import check_options
from emp_llm.checkpoint.checkpoint import Checkpoint
from emp_llm.checkpoint.shard import Shard
from emp_llm.deltas.base import find_base
from emp_llm.errors import OptionError, OutputError
from emp_llm.hub.source import Source, find_source
from emp_llm.options import NO_TARGETS, PruneOptions, needs_masks, packs_rest
from emp_llm.output.carried_files import carry_files
from emp_llm.output.journal import Journal
from emp_llm.output.meta_llama_files import write_original_files
from emp_llm.output.output_folder import OutputFolder
from emp_llm.output.run_description import describe_run, pruning_options
from emp_llm.output.sidecar_files import write_config, write_index
from emp_llm.pruning.delta_plan import check_delta_options, plan_delta
from emp_llm.pruning.plan import PruningPlan
from emp_llm.pruning.plan_report import origin, report_on, shard_fields
from emp_llm.pruning.shard_output import WriteJob, shard_output
from emp_llm.pruning.shard_plan import ShardPlan, output_name
from emp_llm.pruning.stages import (
    Stage,
    beta_for_target_sparsity,
    own_share,
    run_stage,
    surveyed_shards,
)
from emp_llm.report.card.card import write_card
from emp_llm.report.card.figure import write_figure
from emp_llm.report.fields import Report, Trial
from emp_llm.report.file import write_report
from emp_llm.report.file_names import CARD_NAME
from emp_llm.report.folder_files import describe_files
from emp_llm.report.report import Calibrated, Outcome
from emp_llm.report.source_fields import SourceFields
from emp_llm.rule_fields import rule_fields
from emp_llm.runtime.device_choice import asked_devices
from emp_llm.runtime.devices import Devices
from emp_llm.runtime.launcher import meeting_of
from emp_llm.runtime.pipeline import Piece, thread_count
from emp_llm.runtime.progress import Progress, SharedProgress, Silent
from emp_llm.runtime.ranks import join_team
from emp_llm.runtime.team import Team
from emp_llm.runtime.workers import Workers
from emp_llm.selection.mask_store import MaskStore
from emp_llm.selection.sampled_selection import SampledSelection
from emp_llm.selection.selection import Selection
from emp_llm.selection.stored_selection import StoredSelection
from emp_llm.tensors.packed_config import format_version, quantization_config
from emp_llm.verification.finished_shards import find_finished

__all__ = ["prune"]


def prune(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: PruneOptions | None = None,
    *,
    base: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    discard_source: bool = False,
    overwrite: bool = False,
    device: str = "auto",
    threads: int | None = None,
    progress: Progress | None = None,
    distributed: bool = False,
) -> Report:
    """Prune a checkpoint by Effective Model Pruning (arXiv 2509.25606) and write the result.

    >>> from emp_llm import PruneOptions, prune
    >>> report = prune("demo/model", "sparse")
    >>> report["totals"]["targets"]["sparsity"]
    0.364338
    >>> report["totals"]["model"]["bytes_before"], report["totals"]["model"]["bytes_after"]
    (3788160, 2128704)
    >>> half = PruneOptions(target_sparsity=0.5, output_format="dense")
    >>> report = prune("demo/model", "half", half)
    >>> report["rule"]["beta"], report["totals"]["targets"]["kept"]
    (0.7872489, 552960)

    Args:
        model: A folder, or a model of the Hugging Face Hub.
        out: The folder to write. It holds a whole checkpoint afterwards or, after an error, what it
            held before. If the same call may yet succeed, shards that were finished are kept in a
            hidden folder inside it, and the call goes on from there.
        options: What to prune, and how; the paper's choice by default.
        base: The model that `model` was fine-tuned from, a folder or a model of the Hub (its id, or
            an address that names a revision). Then the differences between the two are pruned and
            stored, and added to the base when the result is loaded, so that a base in a folder has
            to stay there. Of each row as many stay as the rule says, sampled as
            `emp_llm.selection.sampled_selection` does. Tensors that are not pruned are stored as
            they are in `model`, except for those that the base has too, the same to the bit.
        revision: Branch, tag or commit of a model of the Hub.
        token: Token for the Hub; by default the one that is logged in.
        discard_source: Whether to delete each shard that this run downloads once it is pruned, so
            that no more than two are on disk at once. What was in the Hub's cache before stays,
            and so does what a run that fails has downloaded.
        overwrite: Whether to replace a checkpoint in `out`.
        device: Where the kernels run: ``cpu``, ``cuda`` (all GPUs of this machine, which share the
            row blocks), ``cuda:N``, or ``auto``: GPUs where they make the run faster, see
            `emp_llm.runtime.gpu_gain.seconds_saved`. The result is the same. Scores from data have
            a device of their own, see `CalibrationOptions`.
        threads: Threads that compute and write; by default all cores, or 3 to 8 for each GPU. The
            result is the same.
        progress: Shows how far the work is; with `distributed`, that of all ranks, on the first.
        distributed: Whether this is one of the processes that torchrun, ``accelerate launch`` or
            srun started to prune together, each its share of the shards. All of them make the
            same call, with an `out` that they share.

    Returns:
        The report, as in the result's ``emp_report.json``.

    Raises:
        CheckpointError: If the source is not a checkpoint that can be pruned, or the base not one
            that it can have been fine-tuned from.
        HubError: If it cannot be downloaded.
        OptionError: If `discard_source` is asked for with a local folder, or with granularity
            `model`, a target sparsity or scores from data, for which all shards are read before
            the first is pruned; if no β gives the target sparsity; if the kernels have no such
            device to run on; as `emp_llm.calibration.option_checks` does; or if what is asked
            for with `base` makes no sense for differences, as scores from data and a dense format.
        OutputError: If `out` cannot be written, overlaps the source or base, or holds an unfinished
            run that differs.
        DeviceError: If a GPU has no room for the work.
        RankError: If another of the processes failed.
    """
    options = options or PruneOptions()
    check_options(options)
    if base is not None:
        check_delta_options(options, discard_source=discard_source)
    _check_discarding(discard_source, options)
    thread_count(threads)  # raises before anything is read if there can be no such number
    shared = SharedProgress(progress or Silent())
    with join_team(meeting_of(os.environ) if distributed else None) as team:
        devices = asked_devices(device, team)
        source, checkpoint = _open(team, model, revision, token, discard_source, shared)
        came_from = origin(model, source)
        of = None if base is None else find_base(base, Path(out), token=token, progress=shared)
        of_base = None if of is None else (of.checkpoint, of.place)
        run = describe_run(checkpoint, pruning_options(options), came_from, of_base)
        folder = OutputFolder(Path(out), overwrite=overwrite, source=source.folder, run=run)
        with folder if team.leads else folder.explaining(), team.working():
            _check_same_folder(folder, team)
            plan = PruningPlan.make(source, checkpoint, options, team)
            workers = _find_workers(plan, devices, threads, shared, team)
            plan = plan if of is None else plan_delta(plan, of, workers)
            beta, tried = _find_beta(plan, workers, folder)
            plan = plan.with_beta(beta)
            if team.leads:
                write_original_files(folder.staging, checkpoint)
            files = {output_name(checkpoint, shard): shard for shard in plan.checkpoint.shards}
            finished = find_finished(files, partial(shard_fields, plan), workers, folder)
            plan = plan.with_beta(_decide_masks(plan, workers, folder.journal))
            _write_shards(plan, workers, folder, finished)
            return team.share(lambda: _publish(plan, workers, folder, came_from, tried))


def _check_discarding(discard_source: bool, options: PruneOptions) -> None:
    """Refuse to delete shards that are read again."""
    if discard_source and (needs_masks(options) or options.max_loss_increase is not None):
        raise OptionError(
            "discard_source: scores from data, repair and a search for β read the source twice: "
            "leave it out"
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
    progress: SharedProgress,
) -> tuple[Source, Checkpoint]:
    """Find and open the source: the same commit on all ranks, even if the branch moves on."""

    def find(revision: str | None) -> Source:
        return find_source(
            model, revision=revision, token=token, discard=discard, progress=progress
        )

    with team.working():
        first = find(revision) if team.leads else None
        commit = team.share(lambda: first.revision if first else None)
        source = first or find(commit)
        return source, source.open_checkpoint()


def _check_same_folder(folder: OutputFolder, team: Team) -> None:
    """Check that all ranks write to the folder that the first one made."""
    if team.share(folder.journal.run) != folder.journal.run():
        raise OutputError(
            f"{folder.path}: rank {team.rank} does not see what rank 0 wrote there: give a folder "
            "that all machines share, by its whole path"
        )


def _find_workers(
    plan: PruningPlan,
    devices: Devices | None,
    threads: int | None,
    progress: SharedProgress,
    team: Team,
) -> Workers:
    """Find the threads and devices that work on this rank's share of the shards."""
    own = own_share(plan.checkpoint.shards, lambda shard: shard.header.file_size, team)
    return Workers.find(
        "pack" if plan.options.output_format == "packed" else "prune",
        # what comes over a network is not worth a GPU
        0 if plan.source.to_come else plan.bytes_to_prune(own),
        devices=devices,
        threads=threads,
        progress=progress,
        team=team,
    )


def _find_beta(
    plan: PruningPlan, workers: Workers, folder: OutputFolder
) -> tuple[float, Sequence[Trial]]:
    """Find β, unless it is given or only scores determine it.

    Returns:
        The β, found or given, and what was tried to find it.
    """
    if plan.options.max_loss_increase is None:
        return beta_for_target_sparsity(plan, workers, folder.staging), ()

    def search() -> tuple[float, list[Trial]]:
        from emp_llm.calibration.beta_search import search_beta

        with MaskStore(folder.journal.masks) as store:
            return search_beta(plan, workers, store)

    beta, tried = workers.team.share(search)
    return beta, tried


def _decide_masks(plan: PruningPlan, workers: Workers, journal: Journal) -> float:
    """Have the first rank decide masks and repair from data, if the options ask for that.

    Returns:
        The β: the plan's, or the one that was found with the masks.
    """
    if not needs_masks(plan.options):
        return plan.options.beta

    def decide() -> float:
        with MaskStore(journal.masks) as store:
            if plan.options.recover:
                from emp_llm.recovery.recover import recover

                return recover(plan, workers, store)
            from emp_llm.calibration.calibrate import calibrate

            return calibrate(plan, workers, store)

    return workers.team.share(decide)


def _write_shards(
    plan: PruningPlan, workers: Workers, folder: OutputFolder, finished: Collection[str]
) -> None:
    """Write this rank's share of the shards that are not finished, and wait for other ranks."""
    left = [s for s in plan.checkpoint.shards if output_name(plan.checkpoint, s) not in finished]
    shards = own_share(left, lambda shard: shard.header.file_size, workers.team)
    surveyed = surveyed_shards(plan, workers)
    with ExitStack() as stack:
        given: Selection | None = None
        if plan.delta is not None:
            given = SampledSelection(plan.options.beta)
        elif needs_masks(plan.options):
            store = stack.enter_context(MaskStore(folder.journal.masks))
            given = StoredSelection(plan.options, store)
        needed = [s for s in plan.checkpoint.shards if s in shards or s in surveyed]
        files = stack.enter_context(plan.source.files(needed))
        output = stack.enter_context(shard_output(folder.staging, files))

        def pieces(shard: Shard, selection: Selection) -> Iterator[Piece]:
            targets, name = plan.targets[shard.name], output_name(plan.checkpoint, shard)
            shard_plan = ShardPlan.make(shard, targets, plan.options)
            new = shard_plan.new_file(name, files.file(shard), selection)
            yield from output.pieces(shard, new, partial(_record, folder.journal, name))

        stage = Stage(
            name=_stage_name(plan.options, workers),
            nbytes=sum(entry.nbytes for shard in left for entry in shard.header.tensors),
            shards=shards,
            files=files,
            pieces=pieces,
        )
        run_stage(plan, workers, stage, given)
    workers.team.gather(None)


def _stage_name(options: PruneOptions, workers: Workers) -> str:
    return "packing" if options.targets == NO_TARGETS else f"pruning{workers.devices.where}"


def _record(journal: Journal, name: str, jobs: Sequence[WriteJob]) -> None:
    outcomes = {
        job.entry.name: Outcome(job.statistics, job.checksum, job.packed_bytes) for job in jobs
    }
    journal.record(name, outcomes)


def _publish(
    plan: PruningPlan,
    workers: Workers,
    folder: OutputFolder,
    origin: SourceFields,
    tried: Sequence[Trial],
) -> Report:
    """Write the files beside the shards, and move everything to its place.

    Returns:
        The report.
    """
    staging, checkpoint = folder.staging, plan.checkpoint
    copied = carry_files(staging, checkpoint, workers, folder.journal)
    write_index(staging, checkpoint)
    calibrated = Calibrated()
    if needs_masks(plan.options):
        with MaskStore(folder.journal.masks) as store:
            calibrated = store.calibrated()
    write_config(staging, checkpoint, _packed_config(plan, calibrated))
    shards = [output_name(checkpoint, shard) for shard in checkpoint.shards]
    outcomes: dict[str, Outcome] = {}
    for name in shards:
        outcomes |= folder.journal.finished_outcomes(name)
    report = report_on(plan, outcomes, origin, calibrated)
    if tried:
        report["search"] = list(tried)
    report["files"] = describe_files(staging, shards, copied)
    write_report(staging, report)
    write_figure(staging, report)
    write_card(staging / CARD_NAME, plan.source.folder / CARD_NAME, report)
    folder.publish()
    return report


def _packed_config(plan: PruningPlan, calibrated: Calibrated) -> dict[str, Any] | None:
    """The ``quantization_config`` of the result; None if it is dense."""
    if plan.options.output_format != "packed":
        return None
    rule = rule_fields(plan.options, calibrated.samples)
    version = format_version(rest_packed=packs_rest(plan.options))
    return quantization_config(rule, version, None if plan.delta is None else plan.delta.base)
