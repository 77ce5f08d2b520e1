"""What a smaller model costs in quality and saves: a table of one model shrunken many ways.

    OMP_NUM_THREADS=1 python benchmarks/shrink_table.py MODEL TRAIN_TEXT TEST_TEXT \
        --json shrink.json

For each row `emp-llm shrink` makes a model in a process of its own, `emp-llm eval` measures the
perplexity of the text, and `emp-llm generate` the speed beside that of the dense model, one after
the other. Blocks that go one by one do so once: rows in which fewer go take the first. Results are
written after each row, and what is there is not made again: an interrupted run goes on where it
was. `--rows` takes names or patterns, such as 'blocks-*'.

Processor seconds are those of the whole process, from start to exit; that of emp-llm tokenizes the
text as well.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

from common import MB, known_results, replace_json, say
from shrink_rows import Row, selected
from timed_process import run as run_timed

from emp_llm.hub.source import find_source
from emp_llm.report.shrink_report import read_shrink_report
from emp_llm.runtime.progress import SharedProgress, Silent
from emp_llm.runtime.workers import Workers
from emp_llm.shrinking.choice import Choice
from emp_llm.shrinking.plan import ShrinkPlan, open_source
from emp_llm.shrinking.writing import write_config_and_index, write_shards

EMP = (sys.executable, "-m", "emp_cli")
SETTINGS = ("samples", "length", "context", "dtype")
PROMPT = "The history of the city begins with a small settlement on the bank of the river, where"
ROUNDS, TOKENS = 3, 48


def main() -> None:
    """Read the command line, make and measure what is missing, and print the table."""
    args = parse()
    results = known_results(args.json, settings(args))
    # rows that are a part of another one come last
    for row in sorted(selected(args.rows), key=lambda row: row.part_of is not None):
        if row.name in results:
            continue
        if row.part_of is not None and row.part_of not in results:
            say(f"{row.name}: left out, for {row.part_of} is not there")
            continue
        say(row.name)
        results[row.name] = measured(row, args, results)
        replace_json(args.json, "shrink", settings(args), results)
    print(table(results))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="a folder")
    parser.add_argument("calibration", type=Path, help="text to calibrate on")
    parser.add_argument("text", type=Path, help="text to measure perplexity on")
    parser.add_argument("--json", type=Path, required=True, help="where results are and go on")
    parser.add_argument("--rows", nargs="+", default=["*"], help="names or patterns; default: all")
    parser.add_argument("--folders", type=Path, default=Path("shrink_models"), help="for models")
    parser.add_argument("--keep", action="store_true", help="keep models after they are measured")
    parser.add_argument("--samples", type=int, default=16, help="to calibrate on (default: 16)")
    parser.add_argument("--length", type=int, default=512, help="tokens in one (default: 512)")
    parser.add_argument("--context", type=int, default=1024, help="of perplexity (default: 1024)")
    parser.add_argument("--dtype", default="float32", help="of perplexity (default: float32)")
    return parser.parse_args()


# --- results on disk -----------------------------------------------------------------------------


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What all rows have in common; texts by name and hash."""
    texts = {
        path.name: sha256(path.read_bytes()).hexdigest() for path in (args.calibration, args.text)
    }
    return {"model": args.model.name, "texts": texts, **{n: getattr(args, n) for n in SETTINGS}}


# --- making and measuring ------------------------------------------------------------------------


def measured(row: Row, args: argparse.Namespace, results: Mapping[str, Any]) -> dict[str, Any]:
    """Make the model of a row, measure it, and delete it."""
    if row.options is None:
        return {"bytes": weight_bytes(args.model), "perplexity": perplexity(args.model, args)}
    folder = args.folders / row.name
    if row.part_of is not None:
        result = write_without(row, folder, args, results[row.part_of]["gone"])
    else:
        result = make(row, folder, args)
    result |= {"bytes": weight_bytes(folder), "perplexity": perplexity(folder, args)}
    if row.timed:
        result["speed"] = speed(folder, args)
    if not args.keep:
        shutil.rmtree(folder)
    return result


def make(row: Row, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Shrink the model, unless an earlier run has; returns what it took and what came out."""
    options = [*(row.options or ()), *(["--seed", str(row.seed)] if row.seed else [])]
    if row.calibrated:
        options += ["--calibration", str(args.calibration)]
        options += ["--samples", str(args.samples), "--length", str(args.length)]
    made = folder.with_suffix(".json")
    if not made.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        took = run_timed([*EMP, "shrink", str(args.model), "--out", str(folder), *options])
        found = {"options": row.options, "cpu_seconds": took.user_seconds + took.system_seconds}
        found |= {"peak_bytes": took.peak_bytes, "gone": gone_one_by_one(folder)}
        made.write_text(json.dumps(found), encoding="utf-8")
    result: dict[str, Any] = json.loads(made.read_text(encoding="utf-8"))
    return result


def gone_one_by_one(folder: Path) -> list[int]:
    """The blocks that went one by one, in order; none if they went at once."""
    report = read_shrink_report(folder)
    if report is None:
        raise SystemExit(f"{folder} has no report, although it was shrunken")
    blocks = report["structures"].get("blocks")
    tried = blocks.get("tried", []) if blocks else []
    return [one["gone"] for one in tried if "gone" in one]


def write_without(
    row: Row, folder: Path, args: argparse.Namespace, gone: Sequence[int]
) -> dict[str, Any]:
    """Write the model without the first of the blocks that went one by one in another row."""
    progress = SharedProgress(Silent())
    source = find_source(args.model, progress=progress)
    plan = ShrinkPlan.make(source, open_source(source), ["blocks"])
    blocks = plan.structures["blocks"]
    (holder,) = blocks.holders
    goes = gone[: blocks.number - int(row.name.rpartition("@")[2])]
    kept = tuple(block for block in range(blocks.number) if block not in goes)
    shrinkage = plan.with_choices([Choice(kind="blocks", kept={holder: kept})])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_shards(shrinkage, Workers(threads=1, progress=progress), folder)
    write_config_and_index(shrinkage, folder)
    for path in args.model.glob("tokenizer*"):
        shutil.copy(path, folder)
    return {"options": [f"without {goes}"]}


def weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def perplexity(folder: Path, args: argparse.Namespace) -> float:
    """The perplexity of the text, by `emp-llm eval`."""
    command = [*EMP, "eval", str(folder), "--json", "--dtype", args.dtype]
    command += ["--context", str(args.context), "--perplexity", str(args.text)]
    found: float = asked(command)["model"]["texts"][args.text.name]["perplexity"]
    return found


def speed(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of a model and of the dense one: medians of some rounds, and their ratio.

    The ratio is that of two runs next to each other, so that other work slows both alike.
    """
    command = [*EMP, "generate", str(folder), PROMPT, "--against", str(args.model), "--json"]
    rounds = [asked([*command, "--max-new-tokens", str(TOKENS)]) for _ in range(ROUNDS)]
    rates = [
        tuple(one[of]["decode_tokens_per_second"] for of in ("model", "against")) for one in rounds
    ]
    return {
        "tokens_per_second": median(ours for ours, _ in rates),
        "dense_tokens_per_second": median(theirs for _, theirs in rates),
        "ratio": median(ours / theirs for ours, theirs in rates),
        "rounds": rates,
    }


def asked(command: list[str]) -> dict[str, Any]:
    """What a command of emp-llm prints as JSON."""
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# --- the table -----------------------------------------------------------------------------------


def table(results: Mapping[str, Any]) -> str:
    """A table in Markdown: the rows there are, in their order."""
    lines = [["", "MB", "perplexity", "tokens/s", "of dense", "CPU s"], ["---"] * 6]
    for row in selected(["*"]):
        if found := results.get(row.name):
            times = found.get("speed", {})
            lines.append(
                [
                    row.name,
                    shown(found["bytes"] / MB, ".1f"),
                    shown(found["perplexity"], ".2f"),
                    shown(times.get("tokens_per_second"), ".1f"),
                    shown(times.get("ratio"), ".2f"),
                    shown(found.get("cpu_seconds"), ".0f"),
                ]
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: float | None, form: str) -> str:
    """A number as it stands in the table; nothing if there is none."""
    return "" if value is None else f"{value:{form}}"


if __name__ == "__main__":
    main()
