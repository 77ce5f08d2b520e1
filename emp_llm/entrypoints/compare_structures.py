"""Compare structures: perplexity with fewer of one kind, by scores and by controls.

    dense → for each number: those that each score ranks best → random ones

Each smaller model is the one that `shrink` would write. It is written to a temporary folder,
measured as every other model is, and deleted.
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
from emp_llm.comparison.saved import Rows, describe_comparison
from emp_llm.comparison.settings import check_runs, depends_on, described
from emp_llm.comparison.structures_bench import StructuresBench
from emp_llm.comparison.structures_costs import DENSE, StructuresComparison, StructuresCost
from emp_llm.comparison.ways import Ways, option_name
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
from emp_llm.shrink_options import ShrinkOptions
from emp_llm.shrinking.choice import Choice, KindName, effective
from emp_llm.shrinking.choosing import checked_criterion, measuring_in, number_of
from emp_llm.shrinking.expert_scores import ExpertScores
from emp_llm.shrinking.plan import ShrinkPlan, open_source
from emp_llm.texts.texts import Protocol, Text, check_protocol

__all__ = ["N_EFF", "compare_structures"]

N_EFF = "n_eff"
"""The amount that the scores themselves say."""

_RANDOM_RUNS = 3


def compare_structures(
    model: str | os.PathLike[str],
    text: str | Text,
    *,
    experts: Sequence[int | str] | None = None,
    blocks: Sequence[int] | None = None,
    neurons: Sequence[int | str] | None = None,
    kv_heads: Sequence[int | str] | None = None,
    scores: Sequence[str] | None = None,
    multiple: int = ShrinkOptions.multiple,
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
) -> StructuresComparison:
    """Measure the perplexity of a model with fewer structures of one kind.

    One of `experts`, `blocks`, `neurons` and `kv_heads` lists how many stay. For each number, each
    score says which ones. All keep as many in every layer, as a config has one number for all:

        experts             aimer, norm; with data also reap
        blocks              with data: influence; loss, one by one
        neurons, kv heads   magnitude; with data also activation, and activation-repaired and
                            obs-repaired, whose readers are repaired
        each                random: random ones, without repair

    A row is measured of the model that `emp_llm.shrink` would write with the same options.

    Args:
        model: A folder, or a model of the Hugging Face Hub.
        text: The text that the models predict.
        experts: How many experts stay in each layer: numbers, shares that are removed such as
            ``"25%"``, and ``"n_eff"``, the effective number of the first score, the mean over all
            layers, rounded up.
        blocks: How many decoder blocks stay.
        neurons: How many neurons stay in each MLP, or shares that are removed.
        kv_heads: How many key-value heads stay in each layer, or shares that are removed.
        scores: Names of scores, as above; of experts also ``module:Class``. By default all that the
            data allow, in the order of ``reap``, ``aimer``, ``norm``; ``influence``, ``loss``;
            ``activation-repaired``, ``obs-repaired``, ``activation``, ``magnitude``.
        multiple: As in `ShrinkOptions`.
        context: As for `emp_llm.compare`.
        protocol: As there.
        dtype: As there.
        device: As there.
        seed: Seed of the first random run; each further run takes the next number.
        random_runs: How often to choose at random for each number; 0 to leave it out.
        calibration: The data; None to leave out what needs it.
        trust_remote_code: As there.
        revision: As there.
        save: As there.
        progress: Reports how far the work is.

    Raises:
        CheckpointError: If the model has no such structures, or cannot be shrunken or run.
        HubError: If it cannot be downloaded.
        OptionError: If an option is out of its range, or the file to save to holds anything else.
        OutputError: If it cannot be written.
    """
    kind, amounts = _one_kind(
        {"experts": experts, "blocks": blocks, "neurons": neurons, "kv heads": kv_heads}
    )
    check_runs(seed, random_runs, dtype, calibration)
    ways = Ways.of(kind, scores, range(seed, seed + random_runs), multiple, calibration)
    for amount in amounts:
        _check(ways, amount)
    check_protocol(protocol)
    check_device(device)
    if save is not None:
        check_place(Path(save))
    shown = progress or Silent()
    workers = Workers(threads=thread_count(None), progress=SharedProgress(shown))
    found = find_model(model, revision=revision, progress=shown)
    source = found.source
    plan = ShrinkPlan.make(source, open_source(source), [kind])
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
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix="emp-llm-compare-")))
        measuring = None
        if kind == "experts" and calibration is not None:
            observed = measuring_in(scratch / "observed", plan, calibration, workers)
            measuring = stack.enter_context(observed)
        scorer = ExpertScores(plan, workers, measuring)
        numbers = _numbers(plan, ways, amounts, scorer)
        settings = {
            option_name(kind): numbers,
            "scores": list(ways.scores),
            "seeds": list(ways.seeds),
            **({"multiple": multiple} if kind == "neurons" else {}),
            **described(calibration),
            **bench.settings,
        }
        options = depends_on(settings, text, calibration, device, trust_remote_code)
        with Rows(
            None if save is None else Path(save),
            describe_comparison(source, name, options),
            read=StructuresCost.from_dict,
            whole=partial(_comparison, name, kind, settings),
        ) as rows:
            if rows.found:
                shown.begin("taken from an earlier run:", rows.found, "rows")
            smaller = StructuresBench(
                plan=plan, bench=bench, workers=workers, store=scratch / "chosen", scorer=scorer
            )
            rows.add((DENSE, plan.structures[kind].number), smaller.dense)
            for number in numbers:
                for score, runs in ways.all_options(number):
                    rows.add((score, number), partial(smaller.cost, score, number, runs))
    return rows.comparison


def _one_kind(
    asked: Mapping[KindName, Sequence[int | str] | None],
) -> tuple[KindName, Sequence[int | str]]:
    """The kind of structures that is asked for, and how many of them."""
    given = {kind: amounts for kind, amounts in asked.items() if amounts is not None}
    if len(given) != 1:
        found = " and ".join(given) or "none of these"
        raise OptionError(
            f"{found} are given: give one of experts, blocks, neurons and kv heads, with a list of "
            "how many stay"
        )
    ((kind, amounts),) = given.items()
    if isinstance(amounts, str) or not amounts:
        raise OptionError(f"{kind} are {amounts!r}; give a list of one or more, such as [6]")
    return kind, amounts


def _check(ways: Ways, amount: int | str) -> None:
    if amount != N_EFF:
        ways.check(amount)
    elif ways.kind != "experts":
        raise OptionError(f"{ways.kind}: {N_EFF} is an amount of experts only: give how many stay")


def _numbers(
    plan: ShrinkPlan, ways: Ways, amounts: Sequence[int | str], scorer: ExpertScores
) -> list[int]:
    """How many structures stay, each number once."""
    numbers = []
    for amount in amounts:
        if amount == N_EFF:
            amount = _effective(plan, ways, scorer)
        numbers.append(number_of(plan, ways.kind, amount, ways.multiple))
    numbers = list(dict.fromkeys(numbers))
    if ways.kind == "kv heads":
        for number in numbers:
            _check_heads(plan, number)
    return numbers


def _effective(plan: ShrinkPlan, ways: Ways, scorer: ExpertScores) -> int:
    """As many experts as the first score's values count as."""
    structures = plan.structures["experts"]
    first = checked_criterion(ways.scores[0], ways.calibration)
    mean = fmean(map(effective, scorer.by(first).values()))
    keep = math.ceil(mean / structures.groups) * structures.groups
    if keep == structures.number:
        raise OptionError(
            f"experts: the scores of {first.name} have an effective number of {mean:.2f}, "
            f"so that all {keep} experts stay: give a number, such as {keep - 1}"
        )
    return max(keep, structures.least)


def _check_heads(plan: ShrinkPlan, number: int) -> None:
    """Check that a config can say so many heads, before anything is measured.

    Raises:
        CheckpointError: If not, as where heads have to divide the hidden size.
    """
    kept = dict.fromkeys(plan.structures["kv heads"].holders, tuple(range(number)))
    plan.with_choices([Choice(kind="kv heads", kept=kept)])


def _comparison(
    name: SourceFields,
    kind: KindName,
    settings: Mapping[str, Any],
    costs: Sequence[StructuresCost],
    taken: int,
) -> StructuresComparison:
    return StructuresComparison(source=name, kind=kind, settings=settings, costs=costs, taken=taken)
