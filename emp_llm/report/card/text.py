"""What a model card says of a pruned model: how to load it, how it was made, what it came to."""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from emp_llm.report.card.loading_code import ANY_NAME, loading_code
from emp_llm.report.evaluation_results import TaskResult
from emp_llm.report.fields import Report, Sums, TargetTotals
from emp_llm.report.prune_command import prune_words
from emp_llm.report.totals import kinds
from emp_llm.rule_fields import RuleFields
from emp_llm.tensors.packed_config import is_packed

__all__ = ["describe"]

_PAPER = "[Effective Model Pruning](https://arxiv.org/abs/2509.25606)"


def describe(
    config: Mapping[str, Any],
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
        results: The figures of its evaluation.
        name: The Hub id the folder goes to; None if that is not known yet.
        revision: The branch there, if it is not the default one.
        figure: The picture that lies beside the card; None if there is none.
    """
    model = _one_line(report["source"]["model"]) if report else ""
    parts = [
        f"# {model}, pruned by Effective Model Pruning"
        if model
        else "# Pruned by Effective Model Pruning",
        _loading(config, name or ANY_NAME, revision),
    ]
    if report:
        parts += [_making(report), *([_showing(figure)] if figure else []), _sizes(report)]
    if results:
        parts += ["## Evaluation", _evaluation(results)]
    return "\n\n".join(parts) + "\n"


def _loading(config: Mapping[str, Any], name: str, revision: str | None) -> str:
    code = "\n".join(["```python", *loading_code(config, name, revision), "```"])
    if not is_packed(config):
        return (
            "This is an ordinary checkpoint with zeros in it: everything that reads the source "
            f"reads it too.\n\n{code}"
        )
    source = "FOLDER" if name == ANY_NAME else name
    options = f" --revision {shlex.quote(revision)}" if revision else ""
    return (
        "> **This checkpoint is packed and needs `import emp_llm`.** Plain transformers refuses "
        "it with a size\n> mismatch. Install the package with `pip install emp-llm`, and import it "
        f"before the model is loaded:\n\n{code}\n\n"
        "Or turn it into an ordinary checkpoint, bit for bit the same weights, which everything "
        "reads:\n\n```\n"
        f"pip install emp-llm\nemp-llm unpack {source}{options} --out DENSE\n```"
    )


def _making(report: Report) -> str:
    rule, source = report["rule"], report["source"]
    revision = f" at {_code(source['revision'])}" if source["revision"] else ""
    ignored = "".join(f" without {_code(pattern)}" for pattern in rule["ignore"])
    return (
        "## How it was made\n\n"
        f"From {_code(source['model'])}{revision} by emp-llm {report['emp_llm_version']} and "
        f"{_PAPER}: of each group the ⌊β · N_eff⌋ weights of the largest {_score(rule)} stay, "
        f"where {_count(rule)}. β = {rule['beta']:g}, a group is a "
        f"{rule['granularity']}, the targets are {_code(rule['targets'])}{ignored}."
        f"{_calibrating(report)}\n\n"
        f"```\n{shlex.join(prune_words(report, model=_one_line(source['model']), out='DIR'))}\n```"
    )


def _score(rule: RuleFields) -> str:
    """What weights are ranked by."""
    criterion: str = rule["criterion"]
    return criterion if criterion == "magnitude" else f"score by {_code(criterion)}"


def _count(rule: RuleFields) -> str:
    """What says how many of them stay."""
    if "magnitude" in (rule["criterion"], rule.get("count_by")):
        return "N_eff = (Σ|w|)² / Σw² is read off the weights"
    return "N_eff = (Σs)² / Σs² is read off the scores s"


def _calibrating(report: Report) -> str:
    """What data went into it, and what was changed by it, if there were any."""
    rule = report["rule"]
    data = rule.get("calibration")
    text = None if data is None else data.get("text")
    sentences = []
    if data is not None and text is not None:
        fed = "pruned" if data.get("sequential", True) else "dense"
        sentences.append(
            f"Calibrated on {data.get('samples')} samples of {data.get('length')} tokens of "
            f"{_code(text)} (seed {data['seed']}), each block fed by the {fed} ones before "
            "it."
        )
    repaired = sum(fields.get("repaired", False) for fields in report["tensors"].values())
    if repaired:
        what = "biases" if rule.get("repair") == "bias" else "the weights that stay"
        tensors = "1 tensor" if repaired == 1 else f"{repaired:,} tensors"
        sentences.append(
            f"To restore what pruned layers give, {what} were changed afterwards ({tensors})."
        )
    unreached = (report.get("calibration") or {}).get("without_tokens", [])
    if unreached:
        matrices = (
            "1 matrix, whose" if len(unreached) == 1 else f"{len(unreached):,} matrices, whose"
        )
        sentences.append(f"No token reached {matrices} weights are ranked by magnitude.")
    return "".join(f" {sentence}" for sentence in sentences)


def _showing(figure: str) -> str:
    return (
        f"![N_eff / N of each block and kind of layer]({figure})\n\n"
        "A cell is what one block has of one kind of layer. The darker it is, the lower N_eff / N "
        "and the more\nis pruned; Gaussian weights have 2/π = 0.6366."
    )


def _sizes(report: Report) -> str:
    totals = report["totals"]
    parts: dict[str, TargetTotals] = {**kinds(report), "all targets": totals["targets"]}
    header = "layer", "tensors", "weights", "sparsity", "retained mass", "bytes before", "after"
    rows = [_line(label, part, f"{part['retained_mass']:.3f}") for label, part in parts.items()]
    rows.append(_line("whole model", totals["model"], ""))
    mass = "Σ|w|" if report["rule"]["criterion"] == "magnitude" else "all scores"
    return (
        f"{_table((*header, 'ratio'), rows, text_columns=1)}\n\n"
        f"Retained mass is the share of {mass} that stays. `emp_report.json` tells of every tensor."
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
    return _table(("task", "dataset", "metric", "this model", "dense"), rows, text_columns=3)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int) -> str:
    rules = ["---" if column < text_columns else "---:" for column in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rules, *rows))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _one_line(text).replace("|", "\\|")


def _code(text: str) -> str:
    """Inline code, whatever backticks are in it."""
    text = _one_line(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if longest else ""
    return f"{fence}{space}{text}{space}{fence}"
