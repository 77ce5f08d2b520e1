"""The files beside the weights of a written checkpoint: index, configuration and others."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from emp_llm.errors import CheckpointError
from emp_llm.evaluation import EVAL_NAME
from emp_llm.page.card_figure import card_figure
from emp_llm.sources.checkpoint import CONFIG_NAME, Checkpoint
from emp_llm.sources.regular_file import open_regular
from emp_llm.sources.safetensors_header import read_header

__all__ = [
    "CARD_NAME",
    "FIGURE_NAME",
    "OF_THEIR_OWN",
    "REPORT_NAME",
    "copy_small_files",
    "small_files",
    "write_config",
    "write_figure",
    "write_index",
    "write_json",
    "write_report",
]

CARD_NAME = "README.md"
REPORT_NAME = "emp_report.json"

_NUMBERS = re.compile(r"\[\n\s+((?:[-+.\deE]+,?\s+)+)\]")
_MOST_INDENTED = 10_000
FIGURE_NAME = "emp_report.svg"

OF_THEIR_OWN = (CARD_NAME, FIGURE_NAME, REPORT_NAME, EVAL_NAME)
"""A report with its figure, and what is written again after it: by people, `eval` and `push`."""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file of JSON for people and programs: indented, a list of numbers on one line."""
    path.write_text(_indented(content) + "\n", encoding="utf-8")


def _indented(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    # within strings JSON has no line ends, so what is matched are lists
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write a report into a folder: as other JSON, but one of very many tensors a line for each.

    Indented, the report of 70,000 tensors comes near the size that is read of any JSON.
    """
    if len(report["tensors"]) <= _MOST_INDENTED:
        write_json(folder / REPORT_NAME, report)
        return
    lines = (
        f"    {json.dumps(name, ensure_ascii=False)}: {json.dumps(fields, ensure_ascii=False)}"
        for name, fields in report["tensors"].items()
    )
    before, after = _indented({**report, "tensors": None}).split('\n  "tensors": null', 1)
    tensors = ",\n".join(lines)
    text = f'{before}\n  "tensors": {{\n{tensors}\n  }}{after}\n'
    (folder / REPORT_NAME).write_text(text, encoding="utf-8")


def write_figure(folder: Path, report: Mapping[str, Any]) -> None:
    """Write the figure of a report into a folder, where the model card shows it."""
    (folder / FIGURE_NAME).write_text(card_figure(report), encoding="utf-8")


def write_index(folder: Path, source: Checkpoint) -> None:
    """Write the index of the shards in a folder, if the source has one."""
    if source.index_name is None:
        return
    weight_map, total = {}, 0
    for shard in source.shards:
        for entry in read_header(folder / shard.safetensors_name).tensors:
            weight_map[entry.name] = shard.safetensors_name
            total += entry.nbytes
    metadata = {**source.index_metadata, "total_size": total}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / source.index_name, index)


def write_config(
    folder: Path, source: Checkpoint, quantization_config: Mapping[str, Any] | None
) -> None:
    """Write the source's configuration, with this quantization_config or with none."""
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    if quantization_config is not None:
        config["quantization_config"] = dict(quantization_config)
    write_json(folder / CONFIG_NAME, config)


def small_files(source: Checkpoint) -> Iterator[Path]:
    """Paths, in a source's folder, of the small files that a folder made from it has as well.

    Tokenizer, generation configuration, licence and the like.
    """
    return (relative for relative in source.other_files if str(relative) not in OF_THEIR_OWN)


def copy_small_files(folder: Path, source: Checkpoint) -> None:
    """Copy the source's `small_files`.

    Raises:
        CheckpointError: If one cannot be read.
    """
    for relative in small_files(source):
        target = folder / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            data = open_regular(source.folder / relative)
        except OSError as error:
            raise CheckpointError(f"{relative}: cannot be read: {error.strerror}") from error
        with data, target.open("xb") as copy:
            shutil.copyfileobj(data, copy)
