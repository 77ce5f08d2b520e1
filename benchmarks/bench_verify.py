"""Times `emp-llm verify`, `verify --against` and `diff` beside reading the same files.

    python benchmarks/bench_verify.py --folder SOME_FOLDER --keep --json result.json

The checkpoint has LLaMA-2-7B's shapes and Gaussian weights, made once from a seed, and lies in the
page cache. Before any result is printed, `verify` must detect one flipped bit, both ways.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

from common import GB, MB, make_checkpoint, prepare_cache, print_table, say, spread, write_json
from timed_process import Run, run

import emp_llm


def main() -> None:
    """Make the checkpoints, check, measure and print."""
    args = parse()
    folder = args.folder / "bench_verify"
    try:
        make_checkpoint(
            folder / "source", layers=args.layers, dtype="bf16", shard_bytes=2 * GB, room=2
        )
        for name in ("packed", "dense"):
            if not (folder / name / "emp_report.json").is_file():
                say(f"pruning to {name}")
                options = emp_llm.PruneOptions(output_format=name)
                emp_llm.prune(folder / "source", folder / name, options)
        commands = {
            "verify packed": (["packed"], ["verify", folder / "packed"]),
            "verify dense": (["dense"], ["verify", folder / "dense"]),
            "verify packed --against source": (
                ["packed", "source"],
                ["verify", folder / "packed", "--against", folder / "source"],
            ),
            "diff packed source": (
                ["packed", "source"],
                ["diff", folder / "packed", folder / "source"],
            ),
        }
        check(folder)
        results = measure(folder, commands, args.rounds)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print_results(results)
    if args.json:
        write_json(args.json, "verify", {"layers": args.layers, "dtype": "bf16"}, results)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where to work")
    parser.add_argument("--layers", type=int, default=6, help="decoder blocks (default: 6, 7.5 GB)")
    parser.add_argument("--rounds", type=int, default=3, help="times each is run (default: 3)")
    parser.add_argument("--keep", action="store_true", help="leave the files for the next run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    args = parser.parse_args()
    if args.layers < 1 or args.rounds < 1:
        parser.error("--layers and --rounds must be positive")
    return args


def check(folder: Path) -> None:
    """Check that one flipped bit near the end of the last shard is detected, and flip it back.

    Raises:
        AssertionError: If it is not, or packed and dense hold different weights.
    """
    packed, source = folder / "packed", folder / "source"
    path = max(packed.glob("*.safetensors"))
    flip(path, -1001)
    try:
        for against in (None, source):
            try:
                emp_llm.verify(packed, against=against)
            except emp_llm.FormatError:
                continue
            raise AssertionError("a flipped bit was not detected")
    finally:
        flip(path, -1001)
    if not emp_llm.diff(packed, folder / "dense")["same_weights"]:
        raise AssertionError("packed and dense differ")


def flip(path: Path, offset: int) -> None:
    """Flip one bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset, 2)
        byte = file.read(1)[0]
        file.seek(offset, 2)
        file.write(bytes([byte ^ 1]))


def measure(
    folder: Path, commands: dict[str, tuple[list[str], list[Any]]], rounds: int
) -> dict[str, Any]:
    """Time all commands in turn, each after a plain read of the same files."""
    files = {
        name: sorted((folder / name).glob("*.safetensors"))
        for name in ("source", "packed", "dense")
    }
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    reads: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, (parts, command) in commands.items():
            paths = [path for part in parts for path in files[part]]
            prepare_cache(paths, cold=False)
            reads[name].append(run(["cat", *map(str, paths)]).seconds)
            arguments = [*map(str, command), "--json"]
            runs[name].append(run([sys.executable, "-m", "emp_cli", *arguments]))
        say(f"round {number + 1} of {rounds}")
    return {
        name: {
            "bytes": sum(path.stat().st_size for part in parts for path in files[part]),
            "read_seconds": spread(reads[name]),
            "seconds": spread([one.seconds for one in runs[name]]),
            "ratio": spread(
                [one.seconds / read for one, read in zip(runs[name], reads[name], strict=True)]
            ),
            "user_seconds": spread([one.user_seconds for one in runs[name]]),
            "peak_bytes": spread([one.peak_bytes for one in runs[name]]),
        }
        for name, (parts, _) in commands.items()
    }


def print_results(results: dict[str, Any]) -> None:
    """Print a table of all results."""
    table = [["", "GB", "cat, s", "s", "GB/s", "ratio", "user CPU, s", "peak, MB"]]
    for name, found in results.items():
        seconds = found["seconds"]["median"]
        table.append(
            [
                name,
                f"{found['bytes'] / GB:.2f}",
                f"{found['read_seconds']['median']:.2f}",
                f"{seconds:.2f}",
                f"{found['bytes'] / GB / seconds:.2f}",
                f"{found['ratio']['median']:.1f}",
                f"{found['user_seconds']['median']:.1f}",
                f"{found['peak_bytes']['median'] / MB:.0f}",
            ]
        )
    print_table(table)


if __name__ == "__main__":
    main()
