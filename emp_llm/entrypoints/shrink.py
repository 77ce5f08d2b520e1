"""Shrink: a checkpoint in, a smaller ordinary one out, with fewer of its parts.

    source → structures → which stay → cuts, checked → shards → config, card, report

Every shard of the source of which something stays becomes one shard of the same name.
"""

import os
from collections.abc import Collection, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from emp_llm.hub.source import find_source
from emp_llm.output.carried_files import carry_files
from emp_llm.output.journal import Journal
from emp_llm.output.meta_llama_files import write_original_files
from emp_llm.output.output_folder import OutputFolder
from emp_llm.output.run_description import calibration_data, describe_run
from emp_llm.pruning.plan_report import origin
from emp_llm.pruning.shard_output import WriteJob
from emp_llm.pruning.shard_plan import output_name
from emp_llm.report.card.card import write_shrunken_card
from emp_llm.report.card.shrunken_figure import write_shrunken_figure
from emp_llm.report.file_names import CARD_NAME
from emp_llm.report.folder_files import describe_files
from emp_llm.report.report import Outcome
from emp_llm.report.shrink_report import ShrinkReport, write_shrink_report
from emp_llm.report.source_fields import SourceFields
from emp_llm.runtime.pipeline import thread_count
from emp_llm.runtime.progress import Progress, SharedProgress, Silent
from emp_llm.runtime.workers import Workers
from emp_llm.selection.mask_store import MaskStore
from emp_llm.shrink_options import ShrinkOptions
from emp_llm.shrinking.choice import Choice
from emp_llm.shrinking.choosing import asked_kinds, check_scores, choose
from emp_llm.shrinking.plan import Shrinkage, ShrinkPlan, open_source
from emp_llm.shrinking.repaired import repaired_files
from emp_llm.shrinking.report_on import report_on, written_fields
from emp_llm.shrinking.writing import write_config_and_index, write_shards
from emp_llm.verification.finished_shards import find_finished

__all__ = ["shrink"]


def shrink(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: ShrinkOptions,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> ShrinkReport:
    """Write a smaller model: the same one with fewer blocks, or experts, neurons or heads in each.

    The result is an ordinary checkpoint, of the same architecture and dtype, which every program
    loads that loads the source. Routers lose what belongs to experts that go, and config.json says
    how many structures are left, and what each block is. All weights that stay keep every bit,
    repaired matrices apart.

    Args:
        model: A folder, or a model of the Hugging Face Hub.
        out: The folder to write. It holds a whole checkpoint afterwards or, after an error, what it
            held before. If the same call may yet succeed, shards that were finished are kept in a
            hidden folder inside it, and the call goes on from there.
        options: What becomes fewer, and by what it is chosen.
        revision: Branch, tag or commit of a model of the Hub.
        token: Token for the Hub; by default the one that is logged in.
        overwrite: Whether to replace a checkpoint in `out`.
        threads: Threads that read and write; by default all cores. The result is the same.
        progress: Shows how far the work is.

    Returns:
        The report, as in the result's ``emp_shrink.json``: which structures stay in each layer,
        with the scores of all of them.

    Raises:
        CheckpointError: If the source is not a checkpoint that can be shrunken so, such as one
            without experts, or if config.json could not say what is left, or if data are needed and
            the model does not run or has no tokenizer.
        HubError: If it cannot be downloaded.
        OptionError: If more are to stay than there are, or fewer than the router picks; if there is
            no such score or device; or if the calibration's text is too short, or nothing uses it.
        OutputError: If `out` cannot be written, overlaps the source, or holds an unfinished run
            that differs.
    """
    check_scores(options)
    workers = Workers(threads=thread_count(threads), progress=SharedProgress(progress or Silent()))
    source = find_source(model, revision=revision, token=token, progress=workers.progress)
    checkpoint = open_source(source)
    came_from = origin(model, source)
    run = describe_run(checkpoint, _run_options(options), came_from)
    with OutputFolder(Path(out), overwrite=overwrite, source=source.folder, run=run) as folder:
        plan = ShrinkPlan.make(source, checkpoint, asked_kinds(options))
        shrinkage = plan.with_choices(_choices(plan, options, workers, folder))
        write_original_files(folder.staging, checkpoint)
        files = {output_name(checkpoint, shard): shard for shard in shrinkage.shards}
        finished = find_finished(files, partial(written_fields, shrinkage), workers, folder)
        record = partial(_record, folder.journal)
        with MaskStore(folder.journal.masks) as store:
            replaced = repaired_files(store)
            write_shards(
                shrinkage,
                workers,
                folder.staging,
                finished=finished,
                replaced=replaced,
                record=record,
            )
        return _publish(shrinkage, options, workers, folder, came_from, replaced)


def _run_options(options: ShrinkOptions) -> dict[str, Any]:
    """The options, under the names by which another command is told how it differs."""
    named = {name.replace("_", " "): value for name, value in asdict(options).items()}
    data = options.calibration and calibration_data(options.calibration)
    return {"command": "shrink", **named, "calibration": data}


def _choices(
    plan: ShrinkPlan, options: ShrinkOptions, workers: Workers, folder: OutputFolder
) -> Sequence[Choice]:
    """The choices that an earlier run has made or, without any, new ones."""
    if (recorded := folder.journal.choices()) is not None:
        return [Choice.from_dict(fields) for fields in recorded]
    choices = choose(plan, options, workers, folder.journal.masks)
    folder.journal.record_choices([choice.to_dict() for choice in choices])
    return choices


def _record(journal: Journal, name: str, jobs: Sequence[WriteJob]) -> None:
    journal.record(name, {job.entry.name: Outcome(checksum=job.checksum) for job in jobs})


def _publish(
    shrinkage: Shrinkage,
    options: ShrinkOptions,
    workers: Workers,
    folder: OutputFolder,
    origin: SourceFields,
    repaired: Collection[str],
) -> ShrinkReport:
    """Write the files beside the shards, and move everything to its place."""
    staging, checkpoint = folder.staging, shrinkage.plan.checkpoint
    copied = carry_files(staging, checkpoint, workers, folder.journal)
    write_config_and_index(shrinkage, staging)
    shards = [output_name(checkpoint, shard) for shard in shrinkage.shards]
    outcomes: dict[str, Outcome] = {}
    for name in shards:
        outcomes |= folder.journal.finished_outcomes(name)
    report = report_on(shrinkage, options, outcomes, origin, repaired)
    with MaskStore(folder.journal.masks) as store:
        if samples := store.notes.get("calibration"):
            report["calibration"] = samples
    report["files"] = describe_files(staging, shards, copied)
    write_shrink_report(staging, report)
    write_shrunken_figure(staging, report)
    write_shrunken_card(staging / CARD_NAME, shrinkage.plan.source.folder / CARD_NAME, report)
    folder.publish()
    return report
