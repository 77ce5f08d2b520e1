"""What pruning costs in quality: a table of a model pruned in many ways, one way after the other.

    python benchmarks/second_text.py reference.txt
    python benchmarks/offline_task.py --out tasks
    OMP_NUM_THREADS=1 python benchmarks/quality_table.py MODEL TRAIN_TEXT test.txt reference.txt \
        --include-path tasks --json quality.json

For each row a model is pruned by `emp-llm prune` in a process of its own, or by llm-compressor in
the virtual environment of `make peers` (--peers), on the same samples, its matrices all as sparse
as EMP's targets are together. `emp-llm eval` measures the perplexity of each text, and answers to a
task of lm-eval. Results are written after each text, and what is there is not made again: an
interrupted run goes on where it was. The folders of --folders hold models that are not measured
yet, and with --keep all.

`--rows` takes names or patterns. Ours beside llm-compressor's, in turn on one machine:

    … --rows preset-repaired@1#0 peer-sparsegpt@1 --peers .venv/peers/bin/python

Seconds and memory are those of the whole process, from start to exit; that of emp-llm tokenizes the
text as well. Processor seconds are the figure to compare where a machine has other work.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from common import MB, known_results, replace_json, say
from quality_rows import Row, selected
from timed_process import run as run_timed

from emp_llm import inspect
from emp_llm.report.file import read_report
from emp_llm.report.file_names import REPORT_NAME

HERE = Path(__file__).parent
PRUNE = (sys.executable, "-m", "emp_cli", "prune")
EVAL = (sys.executable, "-m", "emp_cli", "eval")
SETTINGS = ("samples", "length", "context", "dtype", "task", "questions")


def main() -> None:
    """Read the command line, make and measure what is missing, and print the table."""
    args = parse()
    rows = selected(args.rows)
    results = known_results(args.json, settings(args))
    for row in rows:
        if "task" in results.get(row.name, {}) and not args.again:  # what is measured last
            continue
        if row.peer and args.peers is None:
            say(f"{row.name}: left out, for no --peers is given")
            continue
        say(row.name)
        for result in measured(row, args, {} if args.again else results.get(row.name, {})):
            results[row.name] = result
            replace_json(args.json, "quality", settings(args), results)
    print(table(results, args))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="a folder")
    parser.add_argument("calibration", type=Path, help="text to calibrate on")
    parser.add_argument("texts", type=Path, nargs="+", help="texts to measure perplexity on")
    parser.add_argument("--json", type=Path, required=True, help="where results are and go on")
    parser.add_argument("--rows", nargs="+", default=["*"], help="names or patterns; default: all")
    parser.add_argument("--again", action="store_true", help="measure rows that are there again")
    parser.add_argument("--folders", type=Path, default=Path("quality_models"), help="for models")
    parser.add_argument("--keep", action="store_true", help="keep models after they are measured")
    parser.add_argument("--peers", type=Path, help="the Python that has llm-compressor")
    parser.add_argument("--include-path", type=Path, help="the folder of offline_task.py")
    parser.add_argument("--task", default="wikihow_steps", help="default: wikihow_steps")
    parser.add_argument("--questions", type=int, default=500, help="of the task (default: 500)")
    parser.add_argument("--samples", type=int, default=64, help="to calibrate on (default: 64)")
    parser.add_argument("--length", type=int, default=512, help="tokens in one (default: 512)")
    parser.add_argument("--context", type=int, default=1024, help="of perplexity (default: 1024)")
    parser.add_argument("--dtype", default="float32", help="to measure in (default: float32)")
    return parser.parse_args()


# --- results on disk -----------------------------------------------------------------------------


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What all rows have in common; texts by name and hash."""
    texts = {
        path.name: sha256(path.read_bytes()).hexdigest() for path in (args.calibration, *args.texts)
    }
    common = {name: getattr(args, name) for name in SETTINGS}
    return {"model": args.model.name, "texts": texts, **common}


# --- making and measuring ------------------------------------------------------------------------


def measured(
    row: Row, args: argparse.Namespace, before: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Make the model of a row, unless it is there, measure what is missing, and delete it.

    Args:
        row: The row.
        args: The command line.
        before: What was measured before.

    Yields:
        The row's results, after each text and at the end.
    """
    args.folders.mkdir(parents=True, exist_ok=True)
    folder, made = args.folders / row.name, args.folders / f"{row.name}.json"
    is_made = row.prune is not None or row.peer is not None
    result: dict[str, Any] = {"perplexity": {}}
    if not is_made:
        folder = args.model
    elif args.again or not made.exists():
        made.unlink(missing_ok=True)
        done = make_by_peer(row, folder, args) if row.peer else make(row, folder, args)
        made.write_text(json.dumps(done), encoding="utf-8")
        before = {}  # it was of another model
    if is_made:
        result |= json.loads(made.read_text(encoding="utf-8"))
    result |= before
    for text in args.texts:
        if text.name not in result["perplexity"]:
            result["perplexity"][text.name] = perplexity(folder, text, args)
            yield result
    result["task"] = task(folder, args) if args.include_path else None
    yield result
    if is_made and not args.keep:
        shutil.rmtree(folder)
        made.unlink()


def make(row: Row, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Prune by emp-llm; returns what it took and what came out."""
    if args.again or (folder / REPORT_NAME).exists():  # else prune resumes what was interrupted
        shutil.rmtree(folder, ignore_errors=True)
    options = list(row.prune or ())
    if row.calibrated:
        options += ["--calibration", str(args.calibration), "--seed", str(row.seed)]
        options += ["--samples", str(args.samples), "--length", str(args.length)]
    took = timed([*PRUNE, str(args.model), "--out", str(folder), *options])
    report = read_report(folder)
    if report is None:
        raise SystemExit(f"{folder} has no report, although it was pruned")
    targets, whole = report["totals"]["targets"], report["totals"]["model"]
    return took | {
        "options": list(row.prune or ()),
        "seed": row.seed,
        "sparsity": targets["sparsity"],
        "bytes_ratio": targets["bytes_ratio"],
        "whole_bytes_ratio": whole["bytes_ratio"],
    }


def make_by_peer(row: Row, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Prune by llm-compressor on the same samples, as sparse as EMP's targets are together."""
    shutil.rmtree(folder, ignore_errors=True)
    samples = args.folders / f"samples-{args.samples}-{args.length}-{row.seed}.json"
    if not samples.exists():
        take = [sys.executable, str(HERE / "peers" / "take_samples.py")]
        take += [str(args.model), str(args.calibration), "--seed", str(row.seed)]
        take += ["--samples", str(args.samples), "--length", str(args.length)]
        subprocess.run([*take, "--out", str(samples)], check=True)
    report = inspect(args.model, row.options, curve=False)
    asked = report["totals"]["targets"]["sparsity"]
    result = args.folders / f"{row.name}.peer.json"
    command = [str(args.peers), str(HERE / "peers" / "prune_with_llmcompressor.py")]
    command += [str(args.model), str(samples), "--method", str(row.peer), "--out", str(folder)]
    took = timed([*command, "--sparsity", str(asked), "--json", str(result)])
    found: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
    result.unlink()
    return found | took


def timed(command: list[str]) -> dict[str, Any]:
    """Run a process; returns what it took."""
    took = run_timed(command)
    return {
        "seconds": took.seconds,
        "cpu_seconds": took.user_seconds + took.system_seconds,
        "peak_bytes": took.peak_bytes,
    }


def perplexity(folder: Path, text: Path, args: argparse.Namespace) -> float:
    """The perplexity of a text."""
    options = ["--context", str(args.context), "--perplexity", str(text)]
    found: float = evaluate(folder, options, args)["texts"][text.name]["perplexity"]
    return found


def task(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The scores of the task."""
    options = ["--tasks", args.task, "--include-path", str(args.include_path)]
    options += ["--limit", str(args.questions), "--batch-size", "16"]
    found: dict[str, Any] = evaluate(folder, options, args)["tasks"][args.task]
    return found


def evaluate(folder: Path, options: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """What `emp-llm eval` finds of a model."""
    command = [*EVAL, str(folder), "--json", "--dtype", args.dtype, *options]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)["model"]
    return found


# --- the table -----------------------------------------------------------------------------------


def table(results: Mapping[str, Any], args: argparse.Namespace) -> str:
    """A table in Markdown: the rows there are, in their order, and means over seeds.

    Bytes are those of the targets and of all tensors, relative to dense; a model that a peer wrote
    is dense.
    """
    config = json.loads((args.model / "config.json").read_text(encoding="utf-8"))
    blocks = config["num_hidden_layers"]
    heads = ["", "sparsity", "bytes", "of all", *(path.name for path in args.texts), args.task]
    heads += ["CPU s", "CPU s a block", "peak MB"]
    lines = [heads, ["---"] * len(heads)]
    seeds: dict[str, list[Any]] = {}
    names = [row.name for row in selected(["*"]) if row.name in results]
    for name in names:
        lines.append([name, *cells(results[name], args, blocks)])
        seeds.setdefault(name.partition("#")[0], []).append(results[name])
    for name, found in seeds.items():
        if len(found) > 1:
            spread = [over_seeds(found, text.name) for text in args.texts]
            lines.append([f"{name}, {len(found)} seeds", *[""] * 3, *spread, *[""] * 4])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cells(result: Mapping[str, Any], args: argparse.Namespace, blocks: int) -> list[str]:
    """One row but for its name; empty where something was not measured."""
    answers, cpu = result.get("task"), result.get("cpu_seconds")
    return [
        shown(result.get("sparsity"), ".2%"),
        shown(result.get("bytes_ratio"), ".3f"),
        shown(result.get("whole_bytes_ratio"), ".3f"),
        *(shown(result["perplexity"].get(text.name), ".2f") for text in args.texts),
        f"{answers['acc']:.1%} ± {answers['acc_stderr']:.1%}" if answers else "",
        shown(cpu, ".0f"),
        shown(cpu and cpu / blocks, ".1f"),
        shown(result["peak_bytes"] / MB if cpu else None, ".0f"),
    ]


def over_seeds(found: Sequence[Mapping[str, Any]], text: str) -> str:
    """Mean and sample standard deviation of a perplexity."""
    values = [result["perplexity"][text] for result in found if text in result["perplexity"]]
    if len(values) < 2:
        return ""
    return f"{mean(values):.2f} ± {stdev(values):.2f}"


def shown(value: float | None, form: str) -> str:
    """A number as it stands in the table; nothing if there is none."""
    return "" if value is None else f"{value:{form}}"


if __name__ == "__main__":
    main()
