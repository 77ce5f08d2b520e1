"""Times `emp-llm inspect` beside reading the same files, and checks the bytes that it predicts.

    python benchmarks/bench_inspect.py --folder SOME_FOLDER --keep --json result.json
    python benchmarks/bench_inspect.py --folder SOME_FOLDER --check MODEL

The checkpoint has LLaMA-2-7B's shapes and Gaussian weights, made once from a seed. `inspect` finds
the bytes at some thirty values of β; `cat FILES > /dev/null` reads the same files. They run in
turn, with the files dropped from the page cache before each. With --check, a model is pruned at
five β instead, and the bytes of its tensors and files are compared with those that `inspect`
predicted.
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
    DTYPES,
    GB,
    MB,
    make_checkpoint,
    prepare_cache,
    print_table,
    say,
    spread,
    spread_rows,
    write_json,
)
from timed_process import Run, run

import emp_llm

BETAS = (0.5, 0.75, 1.0, 1.25, 1.5)


def main() -> None:
    """Measure, or check."""
    args = parse()
    folder = args.folder / "bench_inspect"
    if args.check is not None:
        check(args.check, folder / "pruned")
        return
    try:
        make_checkpoint(
            folder / "source",
            layers=args.layers,
            dtype=args.dtype,
            shard_bytes=5 * GB,
            room=0,
        )
        results = measure(folder / "source", args.rounds)
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print_results(results)
    if args.json:
        write_json(args.json, "inspect", {"layers": args.layers, "dtype": args.dtype}, results)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--folder", type=Path, required=True, help="where to work; 13.5 GB with all layers"
    )
    parser.add_argument("--layers", type=int, default=32, help="decoder blocks (default: 32)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: bf16")
    parser.add_argument("--rounds", type=int, default=3, help="times each is run (default: 3)")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint for the next run")
    parser.add_argument("--check", metavar="MODEL", help="prune this model at five β and compare")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    args = parser.parse_args()
    if args.layers < 1 or args.rounds < 1:
        parser.error("--layers and --rounds must be positive")
    return args


def check(model: str, out: Path) -> None:
    """Compare what inspect predicts at five β with what prune writes.

    Raises:
        AssertionError: If a number of bytes or of kept weights differs.
    """
    curve = emp_llm.inspect(model)["curve"]
    for beta in BETAS:
        options = emp_llm.PruneOptions(beta=beta)
        predicted = emp_llm.inspect(model, options, curve=False)
        try:
            report = emp_llm.prune(model, out, options, overwrite=True)
            files = {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
        finally:
            shutil.rmtree(out, ignore_errors=True)
        written = report["totals"]["targets"]["bytes_after"]
        at = curve["beta"].index(beta)
        assert curve["targets"]["bytes"][at] == written
        assert curve["targets"]["kept"][at] == report["totals"]["targets"]["kept"]
        assert predicted["totals"]["targets"] == report["totals"]["targets"]
        assert predicted["files"] == {name: {"bytes": nbytes} for name, nbytes in files.items()}
        print(
            f"β = {beta:g}: {written:,} bytes of targets, {sum(files.values()):,} of files: equal"
        )


def measure(source: Path, rounds: int) -> dict[str, Any]:
    """Time both in turn; returns all results."""
    files = sorted(source.glob("*.safetensors"))
    command = [sys.executable, "-m", "emp_cli", "inspect", str(source), "--json"]
    say("warming up")
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    report = json.loads(output)
    reads: list[float] = []
    inspections: list[Run] = []
    for number in range(rounds):
        prepare_cache(files, cold=True)
        reads.append(time_reading(files))
        prepare_cache(files, cold=True)
        inspections.append(run(command))
        say(f"round {number + 1}: cat {reads[-1]:.2f} s, inspect {inspections[-1].seconds:.2f} s")
    seconds = [inspection.seconds for inspection in inspections]
    return {
        "source_bytes": sum(file.stat().st_size for file in files),
        "target_bytes": report["totals"]["targets"]["bytes_before"],
        "betas": len(report["curve"]["beta"]),
        "read_seconds": spread(reads),
        "inspect_seconds": spread(seconds),
        "ratio": spread([i / r for i, r in zip(seconds, reads, strict=True)]),
        "peak_bytes": spread([inspection.peak_bytes for inspection in inspections]),
        "user_seconds": spread([inspection.user_seconds for inspection in inspections]),
        "system_seconds": spread([inspection.system_seconds for inspection in inspections]),
    }


def time_reading(files: list[Path]) -> float:
    """Seconds that `cat` takes to read the files."""
    start = time.perf_counter()
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def print_results(results: dict[str, Any]) -> None:
    """Print a table of all results."""
    nbytes, targets = results["source_bytes"], results["target_bytes"]
    print(
        f"{nbytes / GB:.2f} GB of weights, {targets / GB:.2f} GB of them targets, dropped from the "
        f"page cache before each run; {results['betas']} values of β"
    )
    lines = (
        ("cat > /dev/null, s", "read_seconds", 1, 2),
        ("inspect, s", "inspect_seconds", 1, 2),
        ("inspect / cat", "ratio", 1, 2),
        ("peak memory, MB", "peak_bytes", MB, 0),
        ("user CPU, s", "user_seconds", 1, 1),
        ("system CPU, s", "system_seconds", 1, 1),
    )
    table = [["", "median", "rounds"], *spread_rows(results, lines)]
    table.append(["cat, GB/s", f"{nbytes / GB / results['read_seconds']['median']:.2f}", ""])
    print_table(table)


if __name__ == "__main__":
    main()
