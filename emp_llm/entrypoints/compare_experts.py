"""Compare experts: perplexity with fewer of them, by scores and by controls.

    dense → for each number of experts: those that each score ranks best → random ones

Scores are computed once. Each smaller model is written to a temporary folder, measured as every
other model is, and deleted.
"""

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from emp_llm.comparison.bench import Bench
from emp_llm.comparison.expert_bench import ExpertBench
from emp_llm.comparison.expert_costs import DENSE, RANDOM, ExpertsComparison, ExpertsCost
from emp_llm.comparison.saved import Rows, describe_comparison
from emp_llm.comparison.settings import check_runs, depends_on, described
from emp_llm.errors import OptionError
from emp_llm.evaluation.found_model import find_model
from emp_llm.evaluation.model_loading import Dtype
from emp_llm.files.atomic import check_place
from emp_llm.options import CalibrationOptions
from emp_llm.pruning.plan_report import origin
from emp_llm.report.source_fields import SourceFields
from emp_llm.runtime.device_choice import check_device
from emp_llm.runtime.pipeline import thread_count
from emp_llm.runtime.progress import Progress, SharedProgress, Silent
from emp_llm.runtime.workers import Workers
from emp_llm.shrink_options import Amount, parse_amount
from emp_llm.shrinking.amounts import number_to_keep
from emp_llm.shrinking.choice import Structures, effective
from emp_llm.shrinking.choosing import checked_criterion, measuring_in
from emp_llm.shrinking.expert_criteria import ExpertCriterion
from emp_llm.shrinking.expert_criterion_registry import find_expert_criterion
from emp_llm.shrinking.expert_scores import ExpertScores
from emp_llm.shrinking.plan import ShrinkPlan, open_source
from emp_llm.texts.texts import Protocol, Text, check_protocol

__all__ = ["N_EFF", "compare_experts"]

N_EFF = "n_eff"
"""The amount that the scores themselves say."""

_RANDOM_RUNS = 3


def compare_experts(
    model: str | os.PathLike[str],
    text: str | Text,
    *,
    experts: Sequence[int | str],
    scores: Sequence[str] | None = None,
    context: int = 2048,
    protocol: Protocol = "paper",
    dtype: Dtype = "auto",
    device: str = "auto",
    seed: int = 0,
    random_runs: int = _RANDOM_RUNS,
    calibration: CalibrationOptions | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    save: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> ExpertsComparison:
    """Measure the perplexity of a mixture with fewer experts, by scores and by controls.

    For each number of experts, each score says which ones stay. All keep as many in every layer, as
    a config has one number for all:

        aimer    those with the smallest mean|w| / rms(w)
        reap     with data: those with the largest mean of gate · ‖output‖
        norm     those with the largest weights, ‖w‖₂
        random   random ones

    Args:
        model: A folder, or a model of the Hugging Face Hub: a mixture of experts.
        text: The text that the models predict.
        experts: How many stay: numbers, shares that are removed such as ``"25%"``, and ``"n_eff"``,
            the effective number of the first score, the mean over all layers, rounded up.
        scores: Names of scores, also ``module:Class``; by default ``reap`` (with data), ``aimer``
            and ``norm``.
        context: As for `emp_llm.compare`.
        protocol: As there.
        dtype: As there.
        device: As there.
        seed: Seed of the first random run; each further run takes the next number.
        random_runs: How often to choose experts at random for each number; 0 to leave it out.
        calibration: The data; None to leave out what needs it.
        trust_remote_code: As there.
        revision: As there.
        save: As there.
        progress: Reports how far the work is.

    Raises:
        CheckpointError: If the model has no experts, or cannot be shrunken or run.
        HubError: If it cannot be downloaded.
        OptionError: If an option is out of its range, or the file to save to holds anything else.
        OutputError: If it cannot be written.
    """
    _check(experts, seed, random_runs, dtype, calibration)
    check_protocol(protocol)
    check_device(device)
    if save is not None:
        check_place(Path(save))
    criteria = _criteria(scores, calibration)
    amounts = [None if one == N_EFF else parse_amount("experts", one) for one in experts]
    shown = progress or Silent()
    workers = Workers(threads=thread_count(None), progress=SharedProgress(shown))
    found = find_model(model, revision=revision, progress=shown)
    source = found.source
    plan = ShrinkPlan.make(source, open_source(source), ["experts"])
    bench = Bench(
        found,
        text,
        context=context,
        protocol=protocol,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=shown,
    )
    name = origin(source.folder, source)

    with ExitStack() as stack:
        measuring = None
        if calibration is not None:
            scratch = Path(stack.enter_context(TemporaryDirectory(prefix="emp-llm-compare-")))
            measuring = stack.enter_context(measuring_in(scratch, plan, calibration, workers))
        scorer = ExpertScores(plan, workers, measuring, seed)
        numbers = _numbers(plan.structures["experts"], amounts, scorer, criteria[0])
        seeds = range(seed, seed + random_runs)
        settings = {
            "experts": numbers,
            "scores": [criterion.name for criterion in criteria],
            "seeds": list(seeds),
            **described(calibration),
            **bench.settings,
        }
        options = depends_on(settings, text, calibration, device, trust_remote_code)
        with Rows(
            None if save is None else Path(save),
            describe_comparison(source, name, options),
            read=ExpertsCost.from_dict,
            whole=partial(_comparison, name, settings),
        ) as rows:
            if rows.found:
                shown.begin("taken from an earlier run:", rows.found, "rows")
            smaller = ExpertBench(plan, scorer, bench, workers)
            rows.add((DENSE, plan.structures["experts"].number), smaller.dense)
            for number in numbers:
                _add(rows, smaller, number, criteria, seeds)
    return rows.comparison


def _check(
    experts: Sequence[int | str],
    seed: int,
    random_runs: int,
    dtype: str,
    calibration: CalibrationOptions | None,
) -> None:
    if isinstance(experts, str) or not experts:
        raise OptionError(f"experts are {experts!r}; give a list of one or more, such as [6]")
    check_runs(seed, random_runs, dtype, calibration)


def _criteria(
    scores: Sequence[str] | None, calibration: CalibrationOptions | None
) -> list[ExpertCriterion]:
    """The scores to compare; the first one says the amount `N_EFF`."""
    if scores is None:
        scores = ("aimer", "norm") if calibration is None else ("reap", "aimer", "norm")
    if isinstance(scores, str) or not scores or len(set(scores)) != len(scores):
        raise OptionError(f"scores are {scores!r}; give a list of one or more, each once")
    return [checked_criterion(one, calibration) for one in scores]


def _numbers(
    structures: Structures,
    amounts: Sequence[Amount | None],
    scorer: ExpertScores,
    first: ExpertCriterion,
) -> list[int]:
    """How many experts stay, each once; None stands for the effective number of scores."""
    numbers = []
    for amount in amounts:
        if amount is None:
            mean = fmean(map(effective, scorer.by(first).values()))
            keep = math.ceil(mean / structures.groups) * structures.groups
            if keep == structures.number:
                raise OptionError(
                    f"experts: the scores of {first.name} have an effective number of {mean:.2f}, "
                    f"so that all {keep} experts stay: give a number, such as {keep - 1}"
                )
            amount = Amount(keep=max(keep, structures.least))
        numbers.append(number_to_keep(structures, amount))
    return list(dict.fromkeys(numbers))


def _comparison(
    name: SourceFields, settings: Mapping[str, Any], costs: Sequence[ExpertsCost], taken: int
) -> ExpertsComparison:
    return ExpertsComparison(source=name, settings=settings, costs=costs, taken=taken)


def _add(
    rows: Rows[ExpertsCost, ExpertsComparison],
    smaller: ExpertBench,
    number: int,
    criteria: Sequence[ExpertCriterion],
    seeds: Sequence[int],
) -> None:
    """Add the scores, and random experts, at one number of experts."""
    for criterion in criteria:
        rows.add((criterion.name, number), partial(smaller.cost, criterion, number))
    if seeds:
        random = find_expert_criterion(RANDOM)
        rows.add((RANDOM, number), partial(smaller.cost, random, number, seeds))
