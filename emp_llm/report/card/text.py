"""The text of a model card: how to load the model, how it was pruned, how large it is."""

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence

from emp_llm.options import NO_TARGETS
from emp_llm.report.card.loading_code import ANY_NAME, loading_code
from emp_llm.report.evaluation_results import TaskResult
from emp_llm.report.fields import Report, Sums, TargetTotals
from emp_llm.report.prune_command import prune_words
from emp_llm.report.totals import kinds, rest_totals
from emp_llm.rule_fields import RuleFields
from emp_llm.tensors.packed_config import is_delta, is_packed

__all__ = ["code", "describe", "is_lossless", "one_line", "table"]

_PAPER = "[Effective Model Pruning](https://arxiv.org/abs/2509.25606)"

_GROUPS = {
    "row": "rows (all weights into one output neuron)",
    "layer": "matrices",
    "model": "all targets together",
}
"""What each granularity takes for a group."""

_TARGETS = {
    "mlp": " (linear layers outside attention)",
    "attention": " (linear layers of attention)",
    "all-linear": " (all linear layers)",
}
"""What a named choice of targets stands for."""

_SIZES = (
    *("layer", "tensors", "weights", "sparsity", "retained mass"),
    *("bytes before", "bytes after", "ratio"),
)


def describe(
    config: Mapping[str, object],
    report: Report | None,
    results: Sequence[TaskResult],
    *,
    name: str | None,
    revision: str | None,
    figure: str | None,
) -> str:
    """Write the section of a card that is ours, in Markdown.

    Args:
        config: The content of the folder's ``config.json``.
        report: The folder's report; None where it has none.
        results: The results of its evaluation.
        name: The Hub id the folder goes to; None if that is not known yet.
        revision: The branch there, if it is not the default one.
        figure: The picture that lies beside the card; None if there is none.
    """
    model = one_line(report["source"]["model"]) if report else ""
    done = _done(config, report)
    parts = [
        f"# {model}, {done}" if model else f"# {done.capitalize()}",
        _loading(config, report, name or ANY_NAME, revision),
    ]
    if report and is_lossless(config, report):
        parts += [_packing(report)]
    elif report:
        parts += [_making(report), "## What was pruned"]
        parts += [*([_showing(figure, report["rule"])] if figure else []), _sizes(report)]
    if results:
        parts += ["## Evaluation", _evaluation(results)]
    return "\n\n".join(parts) + "\n"


def is_lossless(config: Mapping[str, object], report: Report | None) -> bool:
    """Whether nothing was pruned, by the folder's report or, if it has none, its config."""
    if report is not None:
        return report["rule"]["targets"] == NO_TARGETS
    quantization = config.get("quantization_config")
    return isinstance(quantization, dict) and quantization.get("targets") == NO_TARGETS


def _done(config: Mapping[str, object], report: Report | None) -> str:
    if is_delta(config):
        return "a difference pruned by Effective Model Pruning"
    if not is_lossless(config, report):
        return "pruned by Effective Model Pruning"
    return "packed without loss" if is_packed(config) else "nothing pruned"


def _loading(
    config: Mapping[str, object], report: Report | None, name: str, revision: str | None
) -> str:
    lines = "\n".join(["```python", *loading_code(config, name, revision), "```"])
    if not is_packed(config):
        zeros = "" if is_lossless(config, report) else " with zeros in it"
        return (
            f"This is an ordinary checkpoint{zeros}: whatever loads the original model loads this "
            f"one.\n\n{lines}"
        )
    source = "FOLDER" if name == ANY_NAME else name
    needs, same = "needs emp-llm", "with the same weights"
    if is_delta(config):
        needs, same = "needs its base and emp-llm", "of base and difference"
    options = f" --revision {shlex.quote(revision)}" if revision else ""
    return (
        f"> **This checkpoint is packed and {needs}: `pip install emp-llm`.** Where it is "
        "installed, transformers\n> loads this model like any other; elsewhere, it stops with a "
        f"size mismatch.\n\n{lines}\n\n"
        "For programs that do not know emp-llm, unpack it: the result is an ordinary checkpoint "
        f"{same},\nbit for bit.\n\n```\n"
        f"pip install emp-llm\nemp-llm unpack {source}{options} --out DENSE\n```"
    )


def _making(report: Report) -> str:
    settings = "\n".join(f"- {setting}" for setting in _settings(report))
    command = _command(report)
    return (
        "## How it was made\n\n"
        f"Made from {_origin(report)} with emp-llm {report['emp_llm_version']}, "
        f"by {_PAPER}.\n{_principle(report)}\n\n{settings}\n\n"
        f"This command makes the same weights again:\n\n```\n{command}\n```"
    )


def _packing(report: Report) -> str:
    model, command = report["totals"]["model"], _command(report)
    sizes = f"{model['bytes_after']:,} bytes instead of {model['bytes_before']:,}"
    smaller = f" The tensors take {sizes} ({model['bytes_ratio']:.3f})."
    return (
        "## How it was made\n\n"
        f"Made from {_origin(report)} with emp-llm {report['emp_llm_version']}. Nothing was "
        f"pruned: every weight keeps\nevery bit.{smaller if report['format'] == 'packed' else ''}"
        "\n\n"
        f"This command makes the same weights again:\n\n```\n{command}\n```"
    )


def _origin(report: Report) -> str:
    source = report["source"]
    revision = f" at {code(source['revision'])}" if source["revision"] else ""
    return f"{code(source['model'])}{revision}"


def _command(report: Report) -> str:
    return shlex.join(prune_words(report, model=one_line(report["source"]["model"]), out="DIR"))


def _principle(report: Report) -> str:
    """How many weights stay, and which."""
    rule, criterion = report["rule"], report["rule"]["criterion"]
    largest = (
        "weights of largest magnitude"
        if criterion == "magnitude"
        else f"weights with the largest {code(criterion)} scores"
    )
    number = (
        "(Σ|w|)² / Σw² of a group is computed from its weights"
        if "magnitude" in (criterion, rule.get("count_by"))
        else "(Σs)² / Σs² of a group is computed from the scores s of its weights"
    )
    stay = f"In each group of weights the ⌊β · N_eff⌋ {largest} stay, and the others are zero."
    allocated = rule.get("allocate")
    if allocated == "uniform":
        stay = (
            f"In each group the same share of {largest} stays, and the others are zero: as many "
            "together as ⌊β · N_eff⌋ of each group."
        )
    elif allocated == "loss":
        stay += (
            " Each tensor has a β of its own (`emp_report.json` has it), with which the loss rises "
            "the least; as many weights stay together as with one β."
        )
    if "base" in report:
        stay = (
            "In each row ⌊β · N_eff⌋ differences to the base stay. They are sampled: the larger "
            "one is, the likelier it stays, and small ones that stay stand for those that do not."
        )
    if rule.get("repair") == "swaps":
        stay += " The repair then swaps some of them for others of their row."
    return f"{stay} The effective number N_eff = {number}."


def _settings(report: Report) -> Iterator[str]:
    """What was chosen, and what data did, a line each."""
    rule = report["rule"]
    allocated = f", allocate {rule['allocate']}" if "allocate" in rule else ""
    base = report.get("base")
    if base is not None:
        revision = f" at {code(base['revision'])}" if base["revision"] else ""
        yield (
            f"base: {code(base['model'])}{revision}; the weights that were pruned are differences "
            "to it, which are added to it when the model is loaded"
        )
        if (same := report.get("in_base")) is not None:
            yield (
                f"not stored: {same['tensors']:,} tensors ({same['bytes']:,} bytes) that are as in "
                "the base, bit for bit"
            )
    yield f"β = {rule['beta']:g}{allocated}"
    yield f"groups: {_GROUPS[rule['granularity']]}"
    ignored = "".join(f" without {code(pattern)}" for pattern in rule["ignore"])
    named = _TARGETS.get(rule["targets"], "")
    yield f"targets: {code(rule['targets'])}{named}{ignored}"
    data = rule.get("calibration")
    text = None if data is None else data.get("text")
    if data is not None and text is not None:
        before = "pruned" if data.get("sequential", True) else "dense"
        yield (
            f"calibration: {data.get('samples')} samples of {data.get('length')} tokens of "
            f"{code(text)} (seed {data['seed']}); each decoder block was given the outputs of the "
            f"{before} blocks before it"
        )
    repaired = sum(fields.get("repaired", False) for fields in report["tensors"].values())
    tensors = "1 tensor" if repaired == 1 else f"{repaired:,} tensors"
    steps = rule.get("recover")
    if repaired and rule.get("repair"):
        of = "" if steps else f" ({tensors})"
        yield f"repair: {_REPAIRED[rule['repair']]} to restore the outputs of pruned layers{of}"
    if steps:
        yield (
            f"recovery: for {steps:,} steps, the weights that stay, norms and biases were trained "
            f"towards the predictions of the dense model on the calibration text ({tensors})"
        )
    unreached = (report.get("calibration") or {}).get("without_tokens", [])
    if unreached:
        matrices = "1 matrix" if len(unreached) == 1 else f"{len(unreached):,} matrices"
        yield f"ranked by magnitude, since no calibration token reached them: {matrices}"


_REPAIRED = {
    "obs": "the weights that stay were adjusted",
    "swaps": "weights of each row were swapped, and those that stay adjusted,",
    "bias": "biases were adjusted",
}


def _showing(figure: str, rule: RuleFields) -> str:
    by_n_eff = rule.get("count_by", "criterion") == "criterion" and "allocate" not in rule
    of = (
        "/ N and the more\nis pruned."
        if by_n_eff
        else "/ N of the\nscores; how much is pruned was not decided by these alone."
    )
    return (
        f"![N_eff / N of each decoder block and kind of layer]({figure})\n\n"
        "Each cell is one kind of layer in one decoder block. The darker it is, the lower is N_eff "
        f"{of} Gaussian weights have N_eff / N = 2/π = 0.6366."
    )


def _sizes(report: Report) -> str:
    totals = report["totals"]
    parts: dict[str, TargetTotals] = {**kinds(report), "all targets": totals["targets"]}
    rows = [_line(label, part, f"{part['retained_mass']:.3f}") for label, part in parts.items()]
    rest = rest_totals(report)
    rows.append(_line("not pruned", rest, ""))
    whole = "the delta" if "base" in report else "whole model"
    rows.append(_line(whole, totals["model"], ""))
    mass = "Σ|w|" if report["rule"]["criterion"] == "magnitude" else "all scores"
    smaller = rest["bytes_after"] < rest["bytes_before"]
    lossless = "Tensors that were not pruned keep every bit, in fewer bytes. " if smaller else ""
    return (
        f"{table(_SIZES, rows, text_columns=1)}\n\n"
        "Sparsity is the share of weights that were set to zero. "
        f"Retained mass is the share of {mass} that stays. {lossless}`emp_report.json` has these "
        "numbers for every tensor."
    )


def _line(label: str, part: Sums, mass: str) -> Sequence[str]:
    return (
        _cell(label),
        f"{part['tensors']:,}",
        f"{part['weights']:,}",
        f"{part['sparsity']:.2%}",
        mass,
        f"{part['bytes_before']:,}",
        f"{part['bytes_after']:,}",
        f"{part['bytes_ratio']:.3f}",
    )


def _evaluation(results: Iterable[TaskResult]) -> str:
    rows = [
        (
            _cell(result.task.name),
            _cell(result.dataset.name),
            _cell(result.metric.name),
            f"{result.value:.6g}" + (f" ± {result.stderr:.2g}" if result.stderr else ""),
            "" if result.dense_value is None else f"{result.dense_value:.6g}",
        )
        for result in results
    ]
    return table(("task", "dataset", "metric", "this model", "dense"), rows, text_columns=3)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int) -> str:
    """A table in Markdown, whose columns are numbers but for the first ones."""
    rules = ["---" if column < text_columns else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rules, *rows))


def one_line(text: str) -> str:
    """A text without line breaks."""
    return " ".join(text.split())


def _cell(text: str) -> str:
    return one_line(text).replace("|", "\\|")


def code(text: str) -> str:
    """Inline code, whatever backticks are in it."""
    text = one_line(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest else ""
    return f"{fence}{space}{text}{space}{fence}"
