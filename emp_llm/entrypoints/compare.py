"""Compare: perplexity of EMP and of other ways to keep the same number of weights.

    dense → for each β: EMP → at the number of weights that EMP keeps: every control
                            → with data: scores, repair, both

One model is in memory at a time, with no second copy of its weights: each is loaded from the
checkpoint and pruned tensor by tensor on the way, so every control starts from the same weights.
With data, `prune` writes a folder, which is measured and deleted.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory

from emp_llm.checkpoint.checkpoint import open_checkpoint
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.comparison.bench import Bench
from emp_llm.comparison.choices import Choices
from emp_llm.comparison.control_model import ChoiceConfig
from emp_llm.comparison.costs import (
    CONTROLS,
    WITH_DATA,
    Comparison,
    Control,
    Cost,
    Method,
    WithData,
)
from emp_llm.comparison.saved import Rows, describe_comparison
from emp_llm.comparison.settings import check_runs, depends_on, described
from emp_llm.comparison.with_data import options_with_data
from emp_llm.entrypoints.inspect import inspect
from emp_llm.entrypoints.prune import prune
from emp_llm.errors import OptionError
from emp_llm.evaluation.found_model import find_model
from emp_llm.evaluation.model_loading import Dtype
from emp_llm.files.atomic import check_place
from emp_llm.integration.configs import EmpConfig
from emp_llm.options import CalibrationOptions, PruneOptions, patterns
from emp_llm.pruning.plan_report import origin
from emp_llm.report.fields import Report
from emp_llm.report.totals import pruned_tensors
from emp_llm.runtime.device_choice import check_device
from emp_llm.runtime.pipeline import thread_count
from emp_llm.runtime.progress import Progress, Silent
from emp_llm.tensors.target import Target
from emp_llm.texts.texts import Protocol, Text, check_protocol

__all__ = ["BETAS", "RANDOM_RUNS", "compare"]

BETAS = (0.5, 0.75, 1.0, 1.25)
RANDOM_RUNS = 3


def compare(
    model: str | os.PathLike[str],
    text: str | Text,
    *,
    betas: Sequence[float] = BETAS,
    targets: str = "mlp",
    ignore: str | Sequence[str] = (),
    context: int = 2048,
    protocol: Protocol = "paper",
    dtype: Dtype = "auto",
    device: str = "auto",
    seed: int = 0,
    random_runs: int = RANDOM_RUNS,
    calibration: CalibrationOptions | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    save: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Measure the perplexity of EMP, and of other ways to keep the same number of weights.

    For each β, EMP (groups are rows, scores are magnitudes) says how many weights of the targets
    stay. Each control keeps the same number of weights of the same tensors:

        magnitude-row     the largest of each row, the same share of every row
        magnitude-layer   the largest of each matrix, the same share of every matrix
        pq-index          the largest of each row, as many as the PQ index of Diao et al. gives it
                          (see `emp_llm.comparison.pq_index`)
        random            random ones of each row, the same share of every row

    With data, EMP's own counts are kept in every row:

        wanda             those with the largest scores of `wanda`
        obs               those with the largest scores of `obs`
        emp-repaired      the largest, repaired
        obs-repaired      those with the largest scores of `obs`, repaired: the preset ``repaired``

    The counts are whole numbers, and their sums agree to the last weight. A kept weight may be
    zero. Weights are ranked in the checkpoint's dtype, and cast after they are pruned.

    >>> from pathlib import Path
    >>> text = Path("demo/text.txt").read_text()[:20_000]
    >>> found = compare("demo/model", text, betas=[1.0], context=128, random_runs=1)
    >>> [cost.method for cost in found.costs]
    ['dense', 'emp', 'magnitude-row', 'magnitude-layer', 'pq-index', 'random']
    >>> found.emp(1.0).perplexity > found.dense.perplexity
    True

    Args:
        model: A folder, or a model of the Hugging Face Hub: a dense causal language model.
        text: The text that the models predict.
        betas: EMP's multipliers.
        targets: As for `PruneOptions`.
        ignore: As for `PruneOptions`.
        context: As for `emp_llm.evaluation.perplexity.perplexity`.
        protocol: As for `emp_llm.evaluation.perplexity.perplexity`.
        dtype: What the models compute in, by torch's name; ``auto`` for the checkpoint's dtype.
        device: ``auto`` (all GPUs there are, else the CPU), ``cpu``, ``cuda`` or ``cuda:N``.
        seed: Seed of the first random run; each further run takes the next number.
        random_runs: How often to prune at random for each β; 0 to leave it out.
        calibration: The data; None to leave out what needs it. Each method with data writes the
            pruned model to the system's folder for temporary files, one at a time.
        trust_remote_code: Whether code that comes with the model's tokenizer or with the model may
            be run to load it. Which tensors are pruned is found without.
        revision: Branch, tag or commit of a model of the Hub.
        save: A JSON file that gets each row when it is measured. Rows that it has from an earlier
            call with the same model, texts and options are not measured again.
        progress: Reports how far the work is.

    Raises:
        CheckpointError: If the model cannot be pruned.
        HubError: If it cannot be downloaded.
        OptionError: If an option is out of its range, or the file to save to holds anything else.
        OutputError: If it cannot be written.
    """
    ignored = patterns("ignore", ignore)
    _check(betas, seed, random_runs, dtype, calibration)
    if save is not None:
        check_place(Path(save))
    rules = [PruneOptions(beta=b, targets=targets, ignore=ignored) for b in betas]
    check_protocol(protocol)
    check_device(device)
    seeds = range(seed, seed + random_runs)
    progress = progress or Silent()
    found = find_model(model, revision=revision, progress=progress)
    source = found.source
    bench = Bench(
        found,
        text,
        context=context,
        protocol=protocol,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    name = origin(source.folder, source)
    settings = {
        "betas": list(betas),
        "granularity": "row",
        "targets": targets,
        "ignore": list(ignored),
        "seeds": list(seeds),
        **described(calibration),
        **bench.settings,
    }
    options = depends_on(settings, text, calibration, device, trust_remote_code)
    with Rows(
        None if save is None else Path(save),
        describe_comparison(source, name, options),
        read=Cost.from_dict,
        whole=lambda costs, taken: Comparison(
            source=name, settings=settings, costs=costs, taken=taken
        ),
    ) as rows:
        if rows.found:
            progress.begin("taken from an earlier run:", rows.found, "rows")
        reports = [inspect(source.folder, rule, curve=False, progress=progress) for rule in rules]
        choices = cache(partial(_choices, source.folder, reports[0], progress))
        rows.add(("dense", None), partial(_dense, bench, reports[0]))
        for rule, report in zip(rules, reports, strict=True):
            _add_emp_and_controls(rows, bench, rule, report, choices, seeds)
            if calibration is not None:
                _add_with_data(rows, bench, source.folder, rule, calibration, progress)
    return rows.comparison


def _check(
    betas: Sequence[float],
    seed: int,
    random_runs: int,
    dtype: str,
    calibration: CalibrationOptions | None,
) -> None:
    if not isinstance(betas, list | tuple):
        raise OptionError(f"betas is {betas!r}; give a list of numbers, such as [1.0]")
    if not betas or len(set(betas)) != len(betas):
        raise OptionError(f"betas are {list(betas)}; give one or more, each once")
    check_runs(seed, random_runs, dtype, calibration)


def _choices(folder: Path, report: Report, progress: Progress) -> Choices:
    tensors = open_checkpoint(folder).tensors
    targets = [
        Target.of(*tensors[name], transposed=fields["transposed"])
        for name, fields in pruned_tensors(report).items()
    ]
    progress.begin("measuring PQ index", sum(target.entry.nbytes for target in targets))
    with OpenFiles() as files:
        return Choices(targets, files, threads=thread_count(None), progress=progress.advance)


def _dense(bench: Bench, report: Report) -> Cost:
    weights = report["totals"]["targets"]["weights"]
    measured = bench.measure("dense")
    return Cost(method="dense", beta=None, weights=weights, kept=weights, runs=(measured,))


def _add_emp_and_controls(
    rows: Rows[Cost, Comparison],
    bench: Bench,
    rule: PruneOptions,
    report: Report,
    choices: Callable[[], Choices],
    seeds: Sequence[int],
) -> None:
    """Add EMP and, at the number of weights that it keeps, the controls."""
    targets, ignore = rule.targets, rule.ignore
    totals = report["totals"]["targets"]

    def control(name: Control, seed: int | None = None) -> EmpConfig:
        choice = choices().choose(name, totals["kept"], seed)
        return ChoiceConfig(choice, targets=targets, ignore=ignore)

    def cost(method: Method, ways: Iterable[EmpConfig]) -> Cost:
        runs = tuple(bench.measure(f"{method}, β = {rule.beta:g}", way) for way in ways)
        return Cost(
            method=method,
            beta=rule.beta,
            weights=totals["weights"],
            kept=totals["kept"],
            runs=runs,
        )

    def emp() -> Cost:
        return cost("emp", [EmpConfig(beta=rule.beta, targets=targets, ignore=ignore)])

    rows.add(("emp", rule.beta), emp)
    for name in CONTROLS:
        orders = seeds if name == "random" else [None]
        if orders:
            ways = (control(name, seed) for seed in orders)
            rows.add((name, rule.beta), partial(cost, name, ways))


def _add_with_data(
    rows: Rows[Cost, Comparison],
    bench: Bench,
    model: Path,
    rule: PruneOptions,
    calibration: CalibrationOptions,
    progress: Progress,
) -> None:
    """Add EMP with scores and repair from data."""

    def cost(method: WithData) -> Cost:
        with TemporaryDirectory(prefix="emp-llm-compare-") as folder:
            options = options_with_data(method, rule, calibration)
            totals = prune(model, folder, options, progress=progress)["totals"]["targets"]
            found = find_model(folder, progress=progress)
            return Cost(
                method=method,
                beta=rule.beta,
                weights=totals["weights"],
                kept=totals["kept"],
                runs=(bench.measure(f"{method}, β = {rule.beta:g}", found=found),),
            )

    for method in WITH_DATA:
        rows.add((method, rule.beta), partial(cost, method))
