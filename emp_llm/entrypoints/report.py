"""Report: finds the report of a model that was pruned, packed or shrunken before, and checks it."""

import os
from pathlib import Path

from emp_llm.errors import CheckpointError, FormatError
from emp_llm.hub.source import find_file
from emp_llm.options import NO_TARGETS
from emp_llm.report.fields import Report
from emp_llm.report.file_names import REPORT_NAME, SHRINK_REPORT_NAME
from emp_llm.report.folder_files import check_described
from emp_llm.report.schema import read_report_file
from emp_llm.report.shrink_report import ShrinkReport, read_shrink_report

__all__ = ["find_report", "find_shrink_report"]


def find_report(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Report:
    """Read what was done to a pruned or packed model, without its weights.

    >>> from emp_llm import prune
    >>> from emp_llm.entrypoints.report import find_report
    >>> _ = prune("demo/model", "sparse")
    >>> report = find_report("sparse")
    >>> report["rule"]["beta"], report["totals"]["targets"]["sparsity"]
    (1.0, 0.364338)
    >>> report["tensors"]["model.embed_tokens.weight"]["pruned"]
    False

    Args:
        model: A folder that `prune`, `pack` or `unpack` wrote, or such a model of the Hugging Face
            Hub.
        revision: Branch, tag or commit of a model of the Hub.
        token: Token for the Hub; by default the one that is logged in.

    Returns:
        The content of its ``emp_report.json``.

    Raises:
        CheckpointError: If it has no report.
        HubError: If the report cannot be fetched.
        FormatError: If it is not one that emp-llm wrote, or a model was saved over the pruned one.
    """
    path = find_file(model, REPORT_NAME, revision=revision, token=token)
    if path is None:
        raise CheckpointError(
            f"{model}: has no {REPORT_NAME}; give a model that `emp-llm prune` or `emp-llm pack` "
            "wrote, or run `emp-llm inspect` on it"
        )
    report = read_report_file(path)
    lossless = report["rule"]["targets"] == NO_TARGETS
    if not lossless and not any(fields["pruned"] for fields in report["tensors"].values()):
        raise FormatError(
            f"{path}: is not a report that emp-llm wrote: it prunes nothing; prune again"
        )
    if Path(model).is_dir():
        check_described(Path(model), report)
    return report


def find_shrink_report(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> ShrinkReport | None:
    """Read how a model was made smaller, without its weights.

    Args:
        model: A folder, or a model of the Hugging Face Hub.
        revision: Branch, tag or commit of a model of the Hub.
        token: Token for the Hub; by default the one that is logged in.

    Returns:
        The content of its ``emp_shrink.json``; None if it has none, or was pruned or packed since.

    Raises:
        CheckpointError: If the report cannot be read.
        HubError: If it cannot be fetched.
        FormatError: If it is not one that emp-llm wrote.
    """
    names = (REPORT_NAME, SHRINK_REPORT_NAME)
    later, path = (find_file(model, name, revision=revision, token=token) for name in names)
    return None if later is not None or path is None else read_shrink_report(path.parent)
