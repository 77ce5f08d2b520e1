"""The report of a model that was pruned before, found and checked before it is shown."""

import os

from emp_llm.errors import CheckpointError, FormatError
from emp_llm.hub.source import find_file
from emp_llm.report.fields import Report
from emp_llm.report.file_names import REPORT_NAME
from emp_llm.report.schema import read_report_file

__all__ = ["find_report"]


def find_report(
    model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
) -> Report:
    """Find what was done to a pruned model, without its weights.

    Args:
        model: A folder that `prune` or `unpack` wrote, or such a model of the Hugging Face Hub.
        revision: Branch, tag or commit of a model of the Hub.
        token: Token for the Hub; by default the one that is logged in.

    Returns:
        Its ``emp_report.json``.

    Raises:
        CheckpointError: If it has none; HubError if it cannot be fetched.
        FormatError: If it is not one that emp-llm wrote.
    """
    path = find_file(model, REPORT_NAME, revision=revision, token=token)
    if path is None:
        raise CheckpointError(
            f"{model}: has no {REPORT_NAME}; give a model that `emp-llm prune` wrote, or run "
            f"`emp-llm inspect` on it"
        )
    report = read_report_file(path)
    if not any(fields["pruned"] for fields in report["tensors"].values()):
        raise FormatError(
            f"{path}: is not a report that emp-llm wrote: it prunes nothing; prune again"
        )
    return report
