"""The `emp-llm prune` command that gives the weights that a report describes."""

from emp_llm.options import NO_TARGETS, CalibrationOptions, PruneOptions, Rest
from emp_llm.report.fields import Report
from emp_llm.rule_fields import DataFields
from emp_llm.tensors.packed_config import WHOLE_VERSION

__all__ = ["exact_beta", "prune_words"]


def prune_words(
    report: Report, *, out: str, model: str | None = None, beta: bool = True
) -> list[str]:
    """The words of the command, with the options that are not the default.

    Args:
        report: The report.
        out: The folder that the command writes.
        model: The model to prune; by default as the report names it.
        beta: Whether to include the report's β.
    """
    rule, default = report["rule"], PruneOptions()
    usual_data = CalibrationOptions()
    data: DataFields = rule.get("calibration") or {"seed": usual_data.seed}
    source = model or report["source"]["model"]
    if rule["targets"] == NO_TARGETS and _rest(report) == "packed":
        revision = report["source"]["revision"]
        chosen = ["--revision", revision] if revision else []
        return ["emp-llm", "pack", source, "--out", out, *chosen]
    words = ["emp-llm", "prune", source, "--out", out]
    for option, value, usual in (
        ("--base", _base(report), None),
        ("--revision", report["source"]["revision"], None),
        ("--beta", exact_beta(rule["beta"]) if beta else None, exact_beta(default.beta)),
        ("--granularity", rule["granularity"], default.granularity),
        ("--allocate", rule.get("allocate"), default.allocate),
        ("--targets", rule["targets"], default.targets),
        *(("--ignore", pattern, None) for pattern in rule["ignore"]),
        ("--criterion", rule["criterion"], default.criterion),
        ("--count-by", rule.get("count_by"), default.count_by),
        ("--repair", rule.get("repair"), default.repair),
        ("--recover", rule.get("recover"), default.recover),
        ("--calibration", data.get("text"), None),
        ("--samples", data.get("samples"), usual_data.samples),
        ("--length", data.get("length"), usual_data.length),
        ("--seed", data.get("seed"), usual_data.seed),
        ("--format", report["format"], default.output_format),
        ("--rest", _rest(report), default.rest),
    ):
        if value not in (usual, None):
            words += [option, str(value)]
    if data.get("sequential", usual_data.sequential) is False:
        words.append("--no-sequential")
    return words


def _rest(report: Report) -> Rest | None:
    """What became of the tensors that were not pruned, where that could be chosen."""
    if report["format"] != "packed":
        return None
    return "packed" if report["format_version"] >= WHOLE_VERSION else "plain"


def _base(report: Report) -> str | None:
    """The base of a delta as the command takes it: a folder's name, or an address with a commit."""
    base = report.get("base")
    if base is None:
        return None
    if base["revision"] is None:
        return base["model"].rstrip("/").rpartition("/")[2]
    return f"https://huggingface.co/{base['model']}/tree/{base['revision']}"


def exact_beta(beta: float) -> str:
    """The shortest text that is read as exactly this β."""
    return repr(float(beta)).removesuffix(".0")
