"""Structures: what a model has that `shrink` can make fewer, with scores and their N_eff."""

import os
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypedDict

from emp_llm.hub.source import find_source
from emp_llm.options import CalibrationOptions
from emp_llm.pruning.plan_report import origin
from emp_llm.report.shrink_report import StructureFields
from emp_llm.report.source_fields import SourceFields
from emp_llm.runtime.pipeline import thread_count
from emp_llm.runtime.progress import Progress, SharedProgress, Silent
from emp_llm.runtime.workers import Workers
from emp_llm.shrinking.amounts import best
from emp_llm.shrinking.choosing import checked_criterion, measuring_in
from emp_llm.shrinking.expert_scores import ExpertScores
from emp_llm.shrinking.plan import ShrinkPlan, open_source
from emp_llm.shrinking.report_on import structure_fields

__all__ = ["StructuresReport", "inspect_structures"]


class StructuresReport(TypedDict):
    """What `inspect_structures` found.

    Attributes:
        source: The model.
        structures: The structures of each kind; all of them are ``kept``.
    """

    source: SourceFields
    structures: dict[str, StructureFields]


def inspect_structures(
    model: str | os.PathLike[str],
    *,
    score: str = "aimer",
    calibration: CalibrationOptions | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> StructuresReport:
    """Score the experts of each layer, and find how many they count as.

    The effective number N_eff = (Σs)² / Σs² of a layer's scores shows how alike its experts are by
    them: it is their number where all scores are equal. It is a diagnosis. How many experts a model
    can do without is for a measurement to say.

    Args:
        model: A folder, or a model of the Hugging Face Hub, which is downloaded.
        score: How experts are ranked, as for `ShrinkOptions`.
        calibration: The data, for scores that need it; for ``random`` its seed.
        revision: Branch, tag or commit of a model of the Hub.
        token: Token for the Hub; by default the one that is logged in.
        threads: Threads that read and compute; by default all cores.
        progress: Shows how far the work is.

    Returns:
        For each layer the ``scores`` of its experts, and their ``n_eff``.

    Raises:
        CheckpointError: If the source is not a checkpoint that can be shrunken, such as one without
            experts, or cannot be run on the data.
        HubError: If it cannot be downloaded.
        OptionError: If there is no such score, or it needs data and there is none.
    """
    criterion = checked_criterion(score, calibration)
    workers = Workers(threads=thread_count(threads), progress=SharedProgress(progress or Silent()))
    source = find_source(model, revision=revision, token=token, progress=workers.progress)
    plan = ShrinkPlan.make(source, open_source(source), ["experts"])
    experts = plan.structures["experts"]
    seed, measuring = calibration.seed if calibration else 0, None
    with ExitStack() as stack:
        if calibration is not None and calibration.text is not None:
            scratch = stack.enter_context(TemporaryDirectory(prefix="emp-llm-inspect-"))
            measuring = stack.enter_context(measuring_in(Path(scratch), plan, calibration, workers))
        scores = ExpertScores(plan, workers, measuring).by(criterion, seed)
    all_of_them = best(
        experts, experts.number, scores, score=criterion.name, prefers=criterion.prefers
    )
    fields = structure_fields(experts, all_of_them)
    return {"source": origin(model, source), "structures": {"experts": fields}}
