"""Times `from_pretrained` of a packed model beside its dense twin, and pruning while loading.

    python benchmarks/bench_load.py --folder SOME_FOLDER --keep --json result.json

Each load is a process of its own, with torch and transformers imported before the clock starts.
transformers does not read a dense checkpoint when it loads it: it maps the file, and weights are
read when they are first used. So two times are reported: until `from_pretrained` returns, and until
every weight has been read once. Before a number is printed, all ways are checked to load the same
weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import (
    GB,
    MB,
    make_checkpoint,
    prepare_cache,
    print_table,
    say,
    spread,
    write_json,
)

import emp_llm
from emp_llm.runtime.memory import peak_bytes, resident_bytes

WAYS = {
    "dense": "dense twin",
    "packed": "packed",
    "plain": "packed, the rest plain",
    "prune": "pruned while loading",
}
OPTIONS = {
    "dense": emp_llm.PruneOptions(output_format="dense"),
    "packed": emp_llm.PruneOptions(),
    "plain": emp_llm.PruneOptions(rest="plain"),
}
"""How the checkpoints are made that are loaded."""
MEASURED = ("load_seconds", "read_seconds", "peak_bytes")
PAGE = 4096


def main() -> None:
    """Reads the command line, makes the checkpoints, measures, checks and reports."""
    args = parse()
    if args.load:
        print(json.dumps(load(args.load, args.folder)))
        return
    folder = args.folder / "bench_load"
    try:
        make_checkpoint(
            folder / "source", layers=args.layers, dtype="bf16", shard_bytes=5 * GB, room=2
        )
        for name, options in OPTIONS.items():
            if not (folder / name / "emp_report.json").is_file():
                say(f"pruning to {name}")
                emp_llm.prune(folder / "source", folder / name, options)
        results = measure(folder, args.rounds)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    report(results)
    if args.json:
        write_json(args.json, "load", {"layers": args.layers, "dtype": "bf16"}, results)


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where to work")
    parser.add_argument(
        "--layers", type=int, default=8, help="decoder blocks; 8 make 3.8 GB (default: 8)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="times each is loaded (default: 5)")
    parser.add_argument("--keep", action="store_true", help="leave the files for the next run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--load", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.layers < 1 or args.rounds < 1:
        parser.error("--layers and --rounds must be positive")
    return args


def load(way: str, folder: Path) -> dict[str, Any]:
    """Load a model in this process; returns the measurements and a checksum of its weights."""
    import torch
    import xxhash
    from transformers import LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    options = {"quantization_config": emp_llm.EmpConfig()} if way == "prune" else {}
    before = resident_bytes()
    start = time.perf_counter()
    model = LlamaForCausalLM.from_pretrained(folder, **options)
    load_seconds = time.perf_counter() - start
    tensors = [
        tensor.view(-1).view(torch.uint8) for _, tensor in sorted(model.state_dict().items())
    ]
    for tensor in tensors:
        tensor[::PAGE].sum()
    read_seconds = time.perf_counter() - start
    peak = peak_bytes() - before
    checksum = xxhash.xxh3_128()
    for tensor in tensors:
        checksum.update(tensor.numpy().data)
    return {
        "load_seconds": load_seconds,
        "read_seconds": read_seconds,
        "peak_bytes": peak,
        "weights_bytes": sum(tensor.numel() for tensor in tensors),
        "checksum": checksum.hexdigest(),
    }


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """Load each way in turn, with the files in the page cache and without."""
    sources = {way: folder / ("source" if way == "prune" else way) for way in WAYS}
    found: dict[str, dict[str, list[dict[str, Any]]]] = {
        cache: {way: [] for way in WAYS} for cache in ("warm", "cold")
    }
    for number in range(rounds):
        for cache, ways in found.items():
            for way, runs in ways.items():
                files = sorted(sources[way].glob("*.safetensors"))
                prepare_cache(files, cold=cache == "cold")
                command = [sys.executable, __file__, "--folder", str(sources[way]), "--load", way]
                done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
                runs.append(json.loads(done.stdout))
        say(f"round {number + 1} of {rounds}")
    everything = [run for ways in found.values() for runs in ways.values() for run in runs]
    checksums = {run["checksum"] for run in everything}
    if len(checksums) != 1:
        raise AssertionError(f"{len(checksums)} different models were loaded")
    results: dict[str, Any] = {"weights_bytes": everything[0]["weights_bytes"]}
    results["file_bytes"] = {
        way: sum(file.stat().st_size for file in source.glob("*.safetensors"))
        for way, source in sources.items()
    }
    for cache, ways in found.items():
        results[cache] = {
            way: {name: spread([run[name] for run in runs]) for name in MEASURED}
            for way, runs in ways.items()
        }
        for way, runs in ways.items():
            pairs = list(zip(runs, ways["dense"], strict=True))
            results[cache][way]["ratios"] = {
                name: spread([run[name] / dense[name] for run, dense in pairs]) for name in MEASURED
            }
    return results


def report(results: dict[str, Any]) -> None:
    """Prints medians, and of ratios their range."""
    print(f"{results['weights_bytes'] / GB:.2f} GB of weights")
    for cache in ("warm", "cold"):
        table = [[f"{cache} cache", "GB", "load s", "all read s", "ratio", "range", "peak MB"]]
        for way, label in WAYS.items():
            numbers = results[cache][way]
            ratio = numbers["ratios"]["read_seconds"]
            table.append(
                [
                    label,
                    f"{results['file_bytes'][way] / GB:.2f}",
                    f"{numbers['load_seconds']['median']:.2f}",
                    f"{numbers['read_seconds']['median']:.2f}",
                    f"{ratio['median']:.2f}",
                    f"{min(ratio['all']):.2f}-{max(ratio['all']):.2f}",
                    f"{numbers['peak_bytes']['median'] / MB:.0f}",
                ]
            )
        print_table(table)
    print("checked: the same weights every time")


if __name__ == "__main__":
    main()
