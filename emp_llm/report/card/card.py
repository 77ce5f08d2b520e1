"""The model card of a written folder: the source's own card below a section on what was done.

That section stands between two marks, and is replaced when the card is written again. In the
metadata we set ``library_name``, a few tags, ``base_model`` where the source is a model of the Hub,
and the ``model-index`` with the results of an evaluation. We set no ``base_model_relation``: the
Hub knows finetune, adapter, merge and quantized, and none of these is pruning.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emp_llm.checkpoint.json_files import read_json_object
from emp_llm.checkpoint.left_behind import CONFIG_NAME
from emp_llm.report.card.metadata import read_card
from emp_llm.report.card.shrunken_text import describe_shrunken
from emp_llm.report.card.text import describe, is_lossless
from emp_llm.report.evaluation_results import TaskResult, read_results
from emp_llm.report.fields import Report
from emp_llm.report.file_names import FIGURE_NAME, SHRINK_FIGURE_NAME
from emp_llm.report.shrink_report import ShrinkReport
from emp_llm.report.source_fields import SourceFields
from emp_llm.tensors.packed_config import is_packed

if TYPE_CHECKING:
    from huggingface_hub import CardData

__all__ = ["write_card", "write_shrunken_card"]

_BEGIN, _END = "<!-- emp-llm -->", "<!-- /emp-llm -->"
_OUR_SECTION = re.compile(re.escape(_BEGIN) + ".*?" + re.escape(_END) + "\n*", re.DOTALL)
_BEGIN_SHRUNKEN, _END_SHRUNKEN = "<!-- emp-llm shrink -->", "<!-- /emp-llm shrink -->"
_SHRUNKEN_SECTION = re.compile(
    re.escape(_BEGIN_SHRUNKEN) + ".*?" + re.escape(_END_SHRUNKEN) + "\n*", re.DOTALL
)
_SOURCE_NOTE = "\nThe card of the original model follows.\n"
_EMPTY_LINES = re.compile(r"\A(?:[ \t]*\n)+")

_TAGS = ("emp", "pruned", "sparse")
_SHRUNKEN_TAGS = ("emp", "pruned")
_LOSSLESS_TAGS = ("emp",)
_PACKED_TAGS = ("emp-llm",)


def write_card(
    path: Path,
    source_card: Path,
    report: Report | None,
    *,
    repo_id: str | None = None,
    revision: str | None = None,
) -> None:
    """Write a model card into a folder that has its ``config.json``, figure and evaluation.

    The same arguments and files give the same bytes on every machine.

    Args:
        path: The card's file.
        source_card: The card of the model that was pruned or unpacked, or with `repo_id` the
            folder's own. Its metadata and text are kept, except for what an earlier `write_card`
            wrote, and for a source's results, which are not those of the pruned model.
        report: What was done; None if that is not known.
        repo_id: The Hub id that the folder is uploaded to; None if it is not.
        revision: The branch there, if it is not the default one.

    Raises:
        FormatError: If ``emp_eval.json`` is malformed.
    """
    config = read_json_object(path.parent / CONFIG_NAME)
    results = read_results(path.parent)
    card = read_card(source_card)
    tags = _LOSSLESS_TAGS if is_lossless(config, report) else _TAGS
    made_from = report["source"] if report else None
    _set_metadata(card.data, made_from, [*tags, *(_PACKED_TAGS if is_packed(config) else ())])
    index = card.data.pop("model-index")
    if repo_id is None:
        index = None
    if results:
        name = repo_id or f"{report['source']['model'] if report else 'model'}-emp"
        index = _model_index(index, results, name.rpartition("/")[2])
    if index:
        card.data["model-index"] = index
    rest = _EMPTY_LINES.sub("", _OUR_SECTION.sub("", card.text)).rstrip()
    parts = [f"{rest}\n"] if rest else []
    if report is not None or is_packed(config):
        figure = FIGURE_NAME if (path.parent / FIGURE_NAME).is_file() else None
        section = describe(config, report, results, name=repo_id, revision=revision, figure=figure)
        source = _SOURCE_NOTE if report is not None and rest else ""
        parts.insert(0, f"{_BEGIN}\n{section}{source}{_END}\n")
    card.text = "\n" + "\n".join(parts)
    path.write_text(str(card), encoding="utf-8", newline="\n")


def write_shrunken_card(path: Path, source_card: Path, report: ShrinkReport) -> None:
    """Write the model card of a smaller model into a folder that has its config.json and figure.

    It has a section of its own, which stays in the card when the model is pruned afterwards.

    Args:
        path: The card's file.
        source_card: The source's card, which is kept as by `write_card`.
        report: What became smaller.
    """
    config = read_json_object(path.parent / CONFIG_NAME)
    card = read_card(source_card)
    _set_metadata(card.data, report["source"], _SHRUNKEN_TAGS)
    card.data.pop("model-index")
    rest = _OUR_SECTION.sub("", _SHRUNKEN_SECTION.sub("", card.text))
    rest = _EMPTY_LINES.sub("", rest).rstrip()
    has_figure = (path.parent / SHRINK_FIGURE_NAME).is_file()
    section = describe_shrunken(config, report, SHRINK_FIGURE_NAME if has_figure else None)
    source = _SOURCE_NOTE if rest else ""
    parts = [f"{_BEGIN_SHRUNKEN}\n{section}{source}{_END_SHRUNKEN}\n"]
    card.text = "\n" + "\n".join([*parts, *([f"{rest}\n"] if rest else [])])
    path.write_text(str(card), encoding="utf-8", newline="\n")


def _set_metadata(data: "CardData", source: SourceFields | None, tags: Sequence[str]) -> None:
    data["library_name"] = "transformers"
    others = [tag for tag in data.get("tags", []) if tag not in (*_TAGS, *_PACKED_TAGS)]
    data["tags"] = [*others, *tags]
    if source and source["revision"]:
        data["base_model"] = source["model"]
        data.pop("base_model_relation")  # the source's, to the model that it came from


def _model_index(
    older: list[dict[str, Any]] | None, results: Sequence[TaskResult], name: str
) -> list[dict[str, Any]]:
    """The results in the Hub's form, with those on other tasks that the card already has."""
    from huggingface_hub import EvalResult
    from huggingface_hub.repocard_data import (
        eval_results_to_model_index,
        model_index_to_eval_results,
    )

    new = [
        EvalResult(
            task_type=result.task.type,
            task_name=result.task.name,
            dataset_type=result.dataset.type,
            dataset_name=result.dataset.name,
            metric_type=result.metric.type,
            metric_name=result.metric.name,
            metric_value=result.value,
        )
        for result in results
    ]
    try:
        present = model_index_to_eval_results(older)[1] if older else []
    except (KeyError, TypeError, AttributeError):  # not in the Hub's form
        present = []
    others = [old for old in present if not any(old.is_equal_except_value(one) for one in new)]
    return eval_results_to_model_index(name, [*others, *new])
