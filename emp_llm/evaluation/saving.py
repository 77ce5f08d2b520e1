"""The results of an evaluation, added to the folder of the model and to its card."""

import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from emp_llm.checkpoint.json_files import read_json_object
from emp_llm.checkpoint.left_behind import CONFIG_NAME
from emp_llm.errors import OptionError, OutputError
from emp_llm.files.atomic import replacing, write_json
from emp_llm.report.card.card import write_card
from emp_llm.report.evaluation_results import TaskResult, read_results
from emp_llm.report.file import read_report
from emp_llm.report.file_names import CARD_NAME, EVAL_NAME, REPORT_NAME
from emp_llm.report.folder_files import check_described
from emp_llm.tensors.packed_config import is_packed

__all__ = ["check_can_save", "save_results"]


def check_can_save(folder: str | os.PathLike[str]) -> None:
    """Check that results can be added to a folder, before any work is done for them.

    Raises:
        OptionError: If it is not a folder that emp-llm wrote.
        OutputError: If it cannot be written to.
        FormatError: If the results that it has are malformed, or its report is of other weights.
    """
    path = Path(folder)
    if not (path / CONFIG_NAME).is_file():
        raise OptionError(
            f"{path}: is not a model's folder, so nothing can be saved in it: download or prune "
            "the model to a folder first, or leave save out"
        )
    if not (path / REPORT_NAME).is_file() and not is_packed(read_json_object(path / CONFIG_NAME)):
        raise OptionError(
            f"{path}: was not written by emp-llm, which changes no other model's card: leave "
            "save out"
        )
    if not os.access(path, os.W_OK):
        raise OutputError(f"{path}: cannot be written to; leave save out, or copy the folder")
    report = read_report(path)
    if report is not None:
        check_described(path, report)
    read_results(path)


def save_results(folder: str | os.PathLike[str], results: Iterable[TaskResult]) -> None:
    """Add results to a folder's ``emp_eval.json`` and to its card.

    A result takes the place of an older one of the same task, data set and metric; how it was
    measured is part of the metric's name. Each of the two files is whole at any time.

    Raises:
        OptionError: If it is not a folder that emp-llm wrote.
        OutputError: If it cannot be written to.
        FormatError: If the results that it has are malformed.
    """
    check_can_save(folder)
    path = Path(folder)
    merged = {(one.task, one.dataset, one.metric): one for one in read_results(path)}
    merged |= {(one.task, one.dataset, one.metric): one for one in results}
    content = {"results": [asdict(one) for one in merged.values()]}
    card, read = path / CARD_NAME, read_report(path)
    try:
        with replacing(path / EVAL_NAME) as unfinished:
            write_json(unfinished, content)
        with replacing(card) as unfinished:
            write_card(unfinished, card, read)
    except OSError as error:
        raise OutputError(
            f"{error.filename or path}: cannot be written: {error.strerror}; free some space or "
            "copy the folder elsewhere"
        ) from error
