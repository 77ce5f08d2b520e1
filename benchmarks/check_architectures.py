"""Prune, load and save again a tiny model of each class of transformers, and compare every bit.

    python benchmarks/check_architectures.py [--only NAME] [--sample N] [--json FILE]

The classes are those of transformers' auto classes for language, masked, seq2seq, vision-language
and speech models. Each is built tiny from its own config, with random weights in bfloat16, and
saved as checkpoints on the Hub are: safetensors or torch.save, sharded or not. Then

* the packed and the dense output are verified against the source, and the rule in float64 on whole
  tensors gives the dense one;
* the dense folder, the packed one, the source with `EmpConfig`, and the packed one saved again load
  to the same parameters and buffers, bit for bit;
* these are the source's but for +0.0, and transformers names the same missing and unexpected keys.

Each class runs in a process of its own. It ends with status 1 if one of them failed.
"""

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import textwrap
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import transformers
from architecture_check import (
    FAILED,
    NO_TARGET,
    NOT_BUILT,
    NOT_LOADED,
    ROUND_TRIP,
    TARGETS,
    Outcome,
    check_class,
    one_line,
)
from common import say, versions, write_json
from tiny_models import TASKS, model_classes

CONTEXT = multiprocessing.get_context("fork")


def main() -> None:
    """Check all classes, print those that are no round trip, and count."""
    args = parse()
    names = chosen(args)
    outcomes = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for outcome in run(names, Path(folder), jobs=args.jobs, limit=args.limit):
            outcomes.append(outcome)
            say(f"{len(outcomes)}/{len(names)} {outcome.seconds:5.1f} s  {line(outcome)}")
    outcomes.sort(key=lambda outcome: outcome.name)
    print_results(outcomes)
    if args.json:
        settings = {"tasks": TASKS, "only": args.only, "sample": args.sample, "seed": args.seed}
        write_json(args.json, "architectures", settings, {"classes": list(map(asdict, outcomes))})
    sys.exit(any(outcome.status == FAILED for outcome in outcomes))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="these classes")
    parser.add_argument("--sample", type=int, help="so many classes, drawn by chance")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--jobs", type=int, default=1, help="classes at a time")
    parser.add_argument("--limit", type=float, default=300, help="seconds for a class at most")
    parser.add_argument("--folder", type=Path, help="where to put the models, by default /tmp")
    parser.add_argument("--json", type=Path, help="write the results there too")
    return parser.parse_args()


def chosen(args: argparse.Namespace) -> list[str]:
    """The names of the classes that the command line asks for."""
    names = args.only or model_classes()
    if args.sample is not None:
        by_chance = sorted(names, key=lambda name: zlib.crc32(f"{args.seed} {name}".encode()))
        names = sorted(by_chance[: args.sample])
    return names


def run(names: Sequence[str], folder: Path, *, jobs: int, limit: float) -> Iterator[Outcome]:
    """Check classes, several at a time, each in a process of its own."""
    _in_silence()
    # what this imports and compiles, each process has from the start
    check_class("LlamaForCausalLM", folder / "first")
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(partial(run_one, folder=folder, limit=limit), names)


def run_one(name: str, folder: Path, limit: float) -> Outcome:
    """Check a class in a process that is ended after some seconds."""
    started = time.monotonic()
    ours, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_in_process, args=(name, folder / name, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(limit):
            outcome = ours.recv()
        else:
            outcome = Outcome(name=name, status=FAILED, cause=f"took more than {limit:.0f} s")
    except EOFError:
        process.join()
        outcome = Outcome(name=name, status=FAILED, cause=f"ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()
        shutil.rmtree(folder / name, ignore_errors=True)
    return replace(outcome, seconds=round(time.monotonic() - started, 1))


def _in_silence() -> None:
    """Have transformers print nothing."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()


def _in_process(name: str, folder: Path, answer: Connection) -> None:
    folder.mkdir()
    try:
        outcome = check_class(name, folder)
    except Exception as error:
        outcome = Outcome(name=name, status=FAILED, cause=one_line(error, folder))
    answer.send(outcome)


def line(outcome: Outcome) -> str:
    """A class, what became of it, and why."""
    return f"{outcome.name}: {outcome.status}{f': {outcome.cause}' if outcome.cause else ''}"


def print_results(outcomes: Sequence[Outcome]) -> None:
    """Print the counts, each class that was no round trip with the cause, and the round trips."""
    found = versions()
    print(", ".join(f"{name} {found[name]}" for name in ("transformers", "torch", "python")))
    counts = Counter(outcome.status for outcome in outcomes)
    print(f"{len(outcomes)} classes: {_listed(counts)}")
    whole = [outcome for outcome in outcomes if outcome.status == ROUND_TRIP]
    print(f"sources of the round trips: {_listed(Counter(outcome.form for outcome in whole))}")
    print(f"tensors in them: {sum(outcome.tensors for outcome in whole):,}", end="")
    for targets in TARGETS:
        pruned = sum(outcome.pruned[targets] for outcome in whole)
        print(f"; {pruned:,} pruned by --targets {targets}", end="")
    print()
    for status in (FAILED, NOT_BUILT, NOT_LOADED, NO_TARGET):
        if counts[status]:
            print(f"\n{status}")
        for outcome in outcomes:
            if outcome.status == status:
                print(f"  {outcome.name}: {outcome.cause}")
    print(f"\n{ROUND_TRIP}")
    for outcome in whole:
        if outcome.cause:
            print(f"  {outcome.name}, but {outcome.cause}")
    names = ", ".join(outcome.name for outcome in whole if not outcome.cause)
    print(textwrap.fill(names, 100, initial_indent="  ", subsequent_indent="  "))


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in counts.most_common())


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
