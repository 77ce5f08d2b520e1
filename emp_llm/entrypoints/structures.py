"""Structures: what a model has that `shrink` can make fewer, with scores and their N_eff."""

import os
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NotRequired, TypedDict, get_args

from emp_llm.hub.source import find_source
from emp_llm.options import CalibrationOptions
from emp_llm.pruning.plan_report import origin
from emp_llm.report.source_fields import SourceFields
from emp_llm.report.tensor_statistics import digits
from emp_llm.rule_fields import SampleFields
from emp_llm.runtime.device_choice import check_device
from emp_llm.runtime.pipeline import thread_count
from emp_llm.runtime.progress import Progress, SharedProgress, Silent
from emp_llm.runtime.workers import Workers
from emp_llm.shrinking.amounts import best
from emp_llm.shrinking.choice import WIDTHS, Choice, KindName, Structures, effective
from emp_llm.shrinking.choosing import checked_criterion, measuring_in
from emp_llm.shrinking.expert_criteria import ExpertCriterion
from emp_llm.shrinking.expert_scores import ExpertScores
from emp_llm.shrinking.plan import ShrinkPlan, open_source

if TYPE_CHECKING:
    from emp_llm.shrinking.measuring import Measuring

__all__ = ["KindFields", "ScoredHolder", "StructuresReport", "inspect_structures"]


class ScoredHolder(TypedDict):
    """The structures of one decoder block, or the decoder blocks of the model.

    Attributes:
        scores: The score of each, to six digits; of neurons and key-value heads left out.
        n_eff: The effective number (Σs)² / Σs² of the scores, unless one is negative.
    """

    scores: NotRequired[list[float]]
    n_eff: NotRequired[float]


class KindFields(TypedDict):
    """The structures of one kind.

    Attributes:
        field: The field of config.json that gives their number.
        number: How many there are in each holder.
        score: What they were scored by; only where they were.
        n_eff: The effective number of the scores, the mean over all holders.
        holders: Each decoder block that has them, by its name; of blocks their list.
    """

    field: str
    number: int
    score: NotRequired[str]
    n_eff: NotRequired[float]
    holders: dict[str, ScoredHolder]


class StructuresReport(TypedDict):
    """What `inspect_structures` found.

    Attributes:
        source: The model.
        calibration: The samples that scores come from, if from any.
        structures: The kinds that can become fewer.
        refused: Why the other kinds cannot: the model has none, or config.json could not say so.
    """

    source: SourceFields
    calibration: NotRequired[SampleFields]
    structures: dict[KindName, KindFields]
    refused: dict[KindName, str]


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
    """Find what a model has that `shrink` can make fewer, and how many that counts as by scores.

    Experts are scored as `score` says. With data, blocks are scored by ``influence``, neurons and
    key-value heads by ``activation``, as in `ShrinkOptions`.

    The effective number N_eff = (Σs)² / Σs² of a layer's scores shows how alike its structures are
    by them: it is their number where all scores are equal. It is a diagnosis. How many structures a
    model can do without is for a measurement to say.

    Args:
        model: A folder, or a model of the Hugging Face Hub, which is downloaded.
        score: How experts are ranked, as for `ShrinkOptions`.
        calibration: The data; for ``random`` its seed.
        revision: Branch, tag or commit of a model of the Hub.
        token: Token for the Hub; by default the one that is logged in.
        threads: Threads that read and compute; by default all cores.
        progress: Shows how far the work is.

    Raises:
        CheckpointError: If the source is not a checkpoint that can be shrunken, or cannot be run on
            the data.
        HubError: If it cannot be downloaded.
        OptionError: If there is no such score, or it needs data and there is none.
    """
    criterion = checked_criterion(score, calibration)
    if calibration is not None:
        check_device(calibration.device)
    workers = Workers(threads=thread_count(threads), progress=SharedProgress(progress or Silent()))
    source = find_source(model, revision=revision, token=token, progress=workers.progress)
    plan = ShrinkPlan.make(source, open_source(source), get_args(KindName), refusing=False)
    report: StructuresReport = {
        "source": origin(model, source),
        "structures": {},
        "refused": dict(plan.found.refused),
    }
    if calibration is None or calibration.text is None:
        seed = calibration.seed if calibration else 0
        choices = _experts(plan, ExpertScores(plan, workers, None), criterion, seed)
    else:
        with (
            TemporaryDirectory(prefix="emp-llm-inspect-") as scratch,
            measuring_in(Path(scratch) / "measured", plan, calibration, workers) as measuring,
        ):
            scorer = ExpertScores(plan, workers, measuring)
            choices = _experts(plan, scorer, criterion, calibration.seed)
            choices |= _by_data(plan, measuring, calibration, workers, Path(scratch))
            if samples := measuring.store.notes.get("calibration"):
                report["calibration"] = samples
    report["structures"] = {
        kind: _fields(structures, choices.get(kind)) for kind, structures in plan.structures.items()
    }
    return report


def _experts(
    plan: ShrinkPlan, scorer: ExpertScores, criterion: ExpertCriterion, seed: int
) -> dict[KindName, Choice]:
    """The scores of experts, if there are any, in a choice of all."""
    experts = plan.structures.get("experts")
    if experts is None:
        return {}
    scores, name = scorer.by(criterion, seed), criterion.name
    choice = best(experts, experts.number, scores, score=name, prefers=criterion.prefers)
    return {"experts": choice}


def _by_data(
    plan: ShrinkPlan,
    measuring: "Measuring",
    calibration: CalibrationOptions,
    workers: Workers,
    scratch: Path,
) -> dict[KindName, Choice]:
    """The scores of blocks, neurons and key-value heads, in choices of all."""
    from emp_llm.shrinking.block_choice import choose_blocks
    from emp_llm.shrinking.width_choice import score_widths

    choices: dict[KindName, Choice] = {}
    if (blocks := plan.structures.get("blocks")) is not None:
        choices["blocks"] = choose_blocks(measuring, blocks, "influence", number=blocks.number)
    kinds = [kind for kind in WIDTHS if kind in plan.structures]
    for choice in score_widths(plan, kinds, calibration, workers.progress, scratch / "scored"):
        choices[choice.kind] = choice
    return choices


def _fields(structures: Structures, choice: Choice | None) -> KindFields:
    fields: KindFields = {
        "field": structures.field,
        "number": structures.number,
        "holders": {holder: {} for holder in structures.holders},
    }
    if choice is not None:
        fields["score"] = choice.score
        fields["holders"] = {
            holder: _holder(structures.kind, choice.scores[holder]) for holder in structures.holders
        }
        if min(map(min, choice.scores.values())) >= 0:
            fields["n_eff"] = digits(fmean(map(effective, choice.scores.values())))
    return fields


def _holder(kind: KindName, scores: tuple[float, ...]) -> ScoredHolder:
    fields: ScoredHolder = {}
    if min(scores) >= 0:  # as scores are that N_eff is defined for
        fields["n_eff"] = digits(effective(scores))
    if kind not in WIDTHS:  # a layer may have ten thousand neurons
        fields["scores"] = [digits(score) for score in scores]
    return fields
