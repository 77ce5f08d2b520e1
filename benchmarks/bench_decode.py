"""Times Llamas whose weights stay packed in memory beside dense ones, and the products alone.

    python benchmarks/bench_decode.py --folder SOME_FOLDER --json result.json [MODEL ...]

A Llama of TinyLlama-1.1B's shapes is made, 2.2 GB of Gaussian weights in bf16; MODEL are folders of
other dense Llamas. Each way to hold a model is a process of its own that keeps it, so that its
memory is its own. The ways take turns within seconds, so that what else the machine does slows all
of them alike: medians of the rounds are printed, ratios are taken round by round.

Before anything is timed, packed models are checked to give the logits of the same weights unpacked,
and products those of float64, within bounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Self

from common import GB, LLAMA_1B, MB, make_checkpoint, print_table, say, spread, write_json
from decode_kernels import measure_kernels, print_kernels
from decode_worker import DENSE, HALF, WAYS

import emp_llm

HERE = Path(__file__).parent
OPTIONS = {"packed": emp_llm.PruneOptions(), "plain": emp_llm.PruneOptions(rest="plain")}
"""How the checkpoints are made that are not the dense one."""
TEXTS = (1, 4, 16)
PROMPT = 512
TARGETS = {"memory": "≤ 0.60, 0.54", "decode": "≥ 1.00", "prefill": "≤ 1.25"}
"""Of packed ÷ dense bf16; of memory with the rest plain, and packed."""


def main() -> None:
    """Measure the products, then model by model, and print."""
    args = parse()
    folder = args.folder / "bench_decode"
    kernels = [] if args.no_kernels else measure_kernels(args.rounds)
    models = {}
    try:
        for name, source in sources(folder, args):
            say(name)
            models[name] = measure(source, folder, args)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if kernels:
        print_kernels(kernels)
    for name, found in models.items():
        print_model(name, found)
    if args.json:
        settings = {"rounds": args.rounds, "tokens": args.tokens, "layers": args.layers}
        write_json(args.json, "decode", settings, {"kernels": kernels, "models": models})


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL")
    parser.add_argument("--folder", type=Path, required=True, help="where to work")
    parser.add_argument(
        "--layers", type=int, default=22, help="of the Llama that is made; 0: none (default: 22)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="times each is timed (default: 5)")
    parser.add_argument("--tokens", type=int, default=8, help="decoded each time (default: 8)")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, min(2, cores)}))
    parser.add_argument("--no-kernels", action="store_true", help="models only")
    parser.add_argument("--keep", action="store_true", help="leave the files for the next run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    args = parser.parse_args()
    if min(args.rounds, args.tokens, *args.threads) < 1 or args.layers < 0:
        parser.error("--rounds, --tokens and --threads must be positive, --layers not negative")
    return args


def sources(folder: Path, args: argparse.Namespace) -> list[tuple[str, Path]]:
    """Name and folder of each dense model."""
    found = [(model.name, model) for model in args.models]
    if args.layers:
        made = folder / "source"
        make_checkpoint(
            made, layers=args.layers, dtype="bf16", shard_bytes=5 * GB, room=2, sizes=LLAMA_1B
        )
        found.insert(0, (f"Llama of {args.layers} layers, 2048 × 5632", made))
    return found


# --- the ways ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Worker:
    """A process that keeps a model; see `decode_worker.py`."""

    process: subprocess.Popen[str]

    @classmethod
    def start(cls, way: str, folder: Path) -> Self:
        """Start one; its first answer comes when the model is loaded."""
        command = [sys.executable, str(HERE / "decode_worker.py"), way, str(folder)]
        return cls(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )

    def ask(self, question: str) -> dict[str, Any]:
        """Its answer to a line."""
        assert self.process.stdin is not None
        print(question, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """Its next answer."""
        assert self.process.stdout is not None
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.process.kill()
        self.process.communicate()


def measure(source: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model."""
    folders = {"dense": source}
    for name, options in OPTIONS.items():
        folders[name] = folder / f"{source.name}-{name}"
        if not (folders[name] / "emp_report.json").is_file():
            say(f"packing to {name}")
            emp_llm.prune(source, folders[name], options)
    for name in OPTIONS:
        check(folders[name])
    with ExitStack() as stack:
        workers = {}
        for way, (kind, *_) in WAYS.items():
            workers[way] = stack.enter_context(Worker.start(way, folders[kind]))
            say(f"{way}: loaded in {workers[way].answer()['load_seconds']:.1f} s")
        loaded = {way: worker.ask("memory") for way, worker in workers.items()}
        speeds = {count: measure_speed(workers, count, args) for count in args.threads}
        used = {way: worker.ask("memory") for way, worker in workers.items()}
    return {
        "file_bytes": {
            way: sum(file.stat().st_size for file in folders[kind].glob("*.safetensors"))
            for way, (kind, *_) in WAYS.items()
        },
        "memory": {
            way: {
                "before_loading_bytes": loaded[way]["before"],
                "loaded_bytes": loaded[way]["resident"],
                "used_bytes": used[way]["resident"],
                "peak_bytes": used[way]["peak"],
            }
            for way in WAYS
        },
        "threads": speeds,
    }


def check(folder: Path) -> None:
    """Compare logits of a packed checkpoint with those of the same weights in memory in float32.

    Raises:
        AssertionError: If they are much further off with packed weights than with dense ones, which
            are off because activations are rounded to bfloat16.
    """
    command = [sys.executable, str(HERE / "decode_worker.py"), "check", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    off = json.loads(done.stdout)
    say(
        f"{folder.name}: logits are off by {off['packed']:.4f}, of dense weights {off['dense']:.4f}"
    )
    if off["packed"] > 2 * off["dense"]:
        raise AssertionError(f"{folder.name}: the logits of packed weights are wrong")


def measure_speed(
    workers: dict[str, Worker], threads: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Tokens a second of each number of texts, and seconds of a prompt, of each way in turn."""
    for worker in workers.values():
        worker.ask(f"threads {threads}")
    decode: dict[int, dict[str, list[float]]] = {n: {way: [] for way in WAYS} for n in TEXTS}
    prefill: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(args.rounds + 1):
        say(f"{threads} threads: round {number} of {args.rounds}")
        for texts, rates in decode.items():
            for way in ways_for(texts):
                worker = workers[way]
                seconds = median(worker.ask(f"decode {texts} {args.tokens}")["seconds"])
                rates[way].append(texts / seconds)
        for way in ways_for(PROMPT):
            prefill[way].append(workers[way].ask(f"prefill {PROMPT}")["seconds"])
    # the first round warms up: pages of files are mapped, kernels compiled
    return {
        "decode": {
            texts: {way: compared(rates[way][1:], rates[DENSE][1:]) for way in ways_for(texts)}
            for texts, rates in decode.items()
        },
        "prefill": {
            way: compared(prefill[way][1:], prefill[DENSE][1:]) for way in ways_for(PROMPT)
        },
    }


def ways_for(tokens: int) -> list[str]:
    """The ways to multiply by so many tokens: float16 takes torch minutes for more than one.

    CPUs that multiply in bfloat16 do not in float16, but for the newest.
    """
    return [way for way in WAYS if tokens == 1 or way != HALF]


def compared(values: list[float], dense: list[float]) -> dict[str, Any]:
    """Figures of all rounds, and their ratios to those of dense weights."""
    pairs = zip(values, dense, strict=True)
    return {**spread(values), "ratio": spread([value / other for value, other in pairs])}


# --- the result ----------------------------------------------------------------------------------


def print_model(name: str, found: dict[str, Any]) -> None:
    """Prints the medians, and ratios to dense weights with their range."""
    print(f"\n{name}\n")
    rows = [["", *WAYS, "target"], *memory_rows(found)]
    for threads, speeds in found["threads"].items():
        word = "thread" if threads == 1 else "threads"
        rows.append([f"{threads} {word}", *[""] * len(WAYS), ""])
        for texts, decode in speeds["decode"].items():
            label = "1 text" if texts == 1 else f"{texts} texts"
            target = TARGETS["decode"] if texts == 1 else ""
            rows += speed_rows(f"decoding {label}, tokens/s", decode, 1, target)
        label = f"prompt of {PROMPT} tokens, s"
        rows += speed_rows(label, speeds["prefill"], 2, TARGETS["prefill"])
    print_table(rows)


def memory_rows(found: dict[str, Any]) -> list[list[str]]:
    """Files and memory, in MB, and the ratio of what the model takes."""
    memory = found["memory"]
    rows = [["files, MB", *(f"{found['file_bytes'][way] / MB:.0f}" for way in WAYS), ""]]
    for label, key in (
        ("resident before loading, MB", "before_loading_bytes"),
        ("resident after loading, MB", "loaded_bytes"),
        ("resident after use, MB", "used_bytes"),
        ("peak, MB", "peak_bytes"),
    ):
        rows.append([label, *(f"{memory[way][key] / MB:.0f}" for way in WAYS), ""])
    for label, target, taken in (
        ("  ÷ dense", "", {way: each["used_bytes"] for way, each in memory.items()}),
        (
            "  ÷ dense, less what was before",
            TARGETS["memory"],
            {way: it["used_bytes"] - it["before_loading_bytes"] for way, it in memory.items()},
        ),
    ):
        rows.insert(-1, [label, *(f"{taken[way] / taken[DENSE]:.2f}" for way in WAYS), target])
    return rows


def speed_rows(label: str, figures: dict[str, Any], digits: int, target: str) -> list[list[str]]:
    """Medians, and below them the ratios to dense weights."""
    medians, ratios = [f"  {label}"], ["    ÷ dense"]
    for way in WAYS:
        if way not in figures:
            medians.append("")
            ratios.append("")
            continue
        ratio = figures[way]["ratio"]
        low, high = min(ratio["all"]), max(ratio["all"])
        medians.append(f"{figures[way]['median']:.{digits}f}")
        ratios.append("" if way == DENSE else f"{ratio['median']:.2f} ({low:.2f}-{high:.2f})")
    return [[*medians, ""], [*ratios, target]]


if __name__ == "__main__":
    main()
