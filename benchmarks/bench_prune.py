"""Times `emp-llm prune` of a checkpoint with LLaMA-2-7B's shapes beside `cp` of the same files.

    python benchmarks/bench_prune.py --folder SOME_FOLDER --keep --json result.json

Beside both runs `prune --rest plain`, which copies the tensors that it does not prune. All write
the same way, to the same disk, and have everything flushed to it at the end; the ratios of the
times are the result. The weights are Gaussian, made once from a seed. Before any
result is printed, rows of the output are compared with the rule in float64.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from common import (
    DTYPES,
    GB,
    MB,
    machine,
    make_checkpoint,
    prepare_cache,
    print_table,
    say,
    spread,
    spread_rows,
    write_json,
)
from emp_kernels.reference import keep_mask
from emp_kernels.rows import Workspace
from timed_process import Run, run

from emp_llm.checkpoint.checkpoint import open_checkpoint
from emp_llm.checkpoint.header import TensorEntry
from emp_llm.checkpoint.open_files import OpenFiles
from emp_llm.tensors.packed_reader import PackedReader, open_shard
from emp_llm.tensors.whole_reader import WholeReader

SAMPLED_ROWS, SAMPLED_BYTES = 3, 1 << 16


def main() -> None:
    """Make the checkpoint, measure, check and print."""
    args = parse()
    folder = args.folder / "bench_prune"
    for leftover in ("copy", "pruned"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    try:
        make_checkpoint(
            folder / "source",
            layers=args.layers,
            dtype=args.dtype,
            shard_bytes=args.shard_gb * GB,
            room=1,
        )
        results = measure(folder, args)
    finally:
        for name in ("copy", "pruned") if args.keep else ("",):
            shutil.rmtree(folder / name, ignore_errors=True)
    print_results(results, cold=args.cold)
    if args.json:
        settings = {"layers": args.layers, "dtype": args.dtype, "cold": args.cold}
        write_json(args.json, "prune", settings, results)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--folder", type=Path, required=True, help="where to work; 27 GB with all layers"
    )
    parser.add_argument("--layers", type=int, default=32, help="decoder blocks (default: 32)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: bf16")
    parser.add_argument("--shard-gb", type=float, default=5.0, help="size of a shard (default: 5)")
    parser.add_argument("--rounds", type=int, default=3, help="times each is run (default: 3)")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoint for the next run")
    parser.add_argument("--cold", action="store_true", help="drop the source from the page cache")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    args = parser.parse_args()
    if args.layers < 1 or args.rounds < 1 or args.shard_gb <= 0:
        parser.error("--layers, --rounds and --shard-gb must be positive")
    return args


# --- times -----------------------------------------------------------------------------------


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Time both in turn, and check the last output; returns all results."""
    source, copy, pruned = folder / "source", folder / "copy", folder / "pruned"
    files = sorted(source.glob("*.safetensors"))
    nbytes = sum(file.stat().st_size for file in files)
    copies: list[float] = []
    plain: list[Run] = []
    prunes: list[Run] = []
    say("warming up")
    run(prune_command(source, pruned))
    for number in range(args.rounds):
        remove(pruned)
        prepare_cache(files, cold=args.cold)
        copies.append(time_copy(files, copy))
        remove(copy)
        prepare_cache(files, cold=args.cold)
        plain.append(run([*prune_command(source, pruned), "--rest", "plain"]))
        remove(pruned)
        prepare_cache(files, cold=args.cold)
        prunes.append(run(prune_command(source, pruned)))
        say(
            f"round {number + 1}: cp {copies[-1]:.2f} s, prune {prunes[-1].seconds:.2f} s, "
            f"with the rest plain {plain[-1].seconds:.2f} s"
        )
    checked = check(source, pruned)
    totals = json.loads((pruned / "emp_report.json").read_text(encoding="utf-8"))["totals"]
    seconds = [prune.seconds for prune in prunes]
    return {
        "source_bytes": nbytes,
        "pruned_bytes": sum(file.stat().st_size for file in pruned.glob("*.safetensors")),
        "copy_seconds": spread(copies),
        "prune_seconds": spread(seconds),
        "ratio": spread([p / c for p, c in zip(seconds, copies, strict=True)]),
        "plain_seconds": spread([prune.seconds for prune in plain]),
        "plain_ratio": spread([p.seconds / c for p, c in zip(plain, copies, strict=True)]),
        "peak_bytes": spread([prune.peak_bytes for prune in prunes]),
        "user_seconds": spread([prune.user_seconds for prune in prunes]),
        "system_seconds": spread([prune.system_seconds for prune in prunes]),
        "totals": totals,
        "checked": checked,
    }


def prune_command(source: Path, out: Path) -> list[str]:
    """The command that is timed."""
    return [sys.executable, "-m", "emp_cli", "prune", str(source), "--out", str(out), "--json"]


def time_copy(files: list[Path], out: Path) -> float:
    """Seconds to copy the files and flush them to disk."""
    out.mkdir()
    start = time.perf_counter()
    subprocess.run(["cp", *files, out], check=True)
    for path in [*(out / file.name for file in files), out]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.perf_counter() - start


def remove(folder: Path) -> None:
    """Delete an output and flush, so that the disk has no work left during the next run."""
    shutil.rmtree(folder)
    os.sync()


# --- the check -----------------------------------------------------------------------------------


def check(source: Path, pruned: Path) -> dict[str, int]:
    """Compare sampled rows with the rule in float64, and untouched tensors with the source.

    Returns:
        How many rows and how many untouched tensors were compared.

    Raises:
        AssertionError: If one differs.
    """
    before, after = open_checkpoint(source), open_checkpoint(pruned)
    rng = np.random.default_rng(2)
    rows = tensors = 0
    for old, new in zip(before.shards, after.shards, strict=True):
        with (
            old.path.open("rb") as old_file,
            new.path.open("rb") as new_file,
            OpenFiles() as files,
        ):
            readers, plain = open_shard(new, files.file(new))
            entries = {entry.name: entry for entry in old.header.tensors}
            if entries.keys() != readers.keys() | {entry.name for entry in plain}:
                raise AssertionError(f"{new.name} and its source hold different tensors")
            for name, reader in readers.items():
                beta = 1.0 if isinstance(reader, PackedReader) else math.inf
                for row in rng.integers(0, reader.geometry.rows, SAMPLED_ROWS).tolist():
                    check_row(reader, row, beta, old_file, entries[name].start)
                    rows += 1
            for entry in plain:
                check_bytes(old_file, entries[entry.name], new_file, entry)
                tensors += 1
    return {"rows": rows, "tensors": tensors}


def check_row(
    reader: PackedReader | WholeReader, row: int, beta: float, file: BinaryIO, start: int
) -> None:
    """Compare a row of a packed tensor with the rule applied to the same row of the source."""
    geometry, workspace = reader.geometry, Workspace()
    source = os.pread(file.fileno(), geometry.row_bytes, start + row * geometry.row_bytes)
    weights = np.frombuffer(source, geometry.number_format.storage)
    magnitudes = geometry.number_format.magnitudes(weights)
    keep = np.ones_like(weights, bool) if math.isinf(beta) else keep_mask(magnitudes, beta=beta)
    block = next(b for b in geometry.row_blocks() if row < geometry.first_row(b) + b.stop - b.start)
    found = reader.read(block, workspace).rows[row - geometry.first_row(block)]
    if not np.array_equal(found, np.where(keep, weights, 0)):
        raise AssertionError(f"{reader.name!r} row {row} is not the rule applied to its source")


def check_bytes(old_file: BinaryIO, old: TensorEntry, new_file: BinaryIO, new: TensorEntry) -> None:
    """Compare an untouched tensor with the source: its beginning, middle and end."""
    if (old.dtype, old.shape) != (new.dtype, new.shape):
        raise AssertionError(f"{old.name!r} and its source differ in dtype or shape")
    for at in (0, old.nbytes // 2, max(0, old.nbytes - SAMPLED_BYTES)):
        length = min(SAMPLED_BYTES, old.nbytes - at)
        expected = os.pread(old_file.fileno(), length, old.start + at)
        if os.pread(new_file.fileno(), length, new.start + at) != expected:
            raise AssertionError(f"{old.name!r} differs from its source")


# --- results ----------------------------------------------------------------------------------


def print_results(results: dict[str, Any], *, cold: bool) -> None:
    """Print a table of all results."""
    nbytes = results["source_bytes"]
    ram = machine()["ram_bytes"]
    cache = "dropped from the page cache" if cold else "read into the page cache before each run"
    print(f"{nbytes / GB:.2f} GB of weights, {cache}; {ram / GB:.1f} GB of RAM")
    lines = (
        ("cp and flush, s", "copy_seconds", 1, 2),
        ("prune, s", "prune_seconds", 1, 2),
        ("prune / cp", "ratio", 1, 2),
        ("prune --rest plain, s", "plain_seconds", 1, 2),
        ("prune --rest plain / cp", "plain_ratio", 1, 2),
        ("peak memory, MB", "peak_bytes", MB, 0),
        ("user CPU, s", "user_seconds", 1, 1),
        ("system CPU, s", "system_seconds", 1, 1),
    )
    table = [["", "median", "rounds"], *spread_rows(results, lines)]
    for label, key in (("cp, GB/s", "copy_seconds"), ("prune, GB/s of source", "prune_seconds")):
        table.append([label, f"{nbytes / GB / results[key]['median']:.2f}", ""])
    for part, totals in results["totals"].items():
        before, after = totals["bytes_before"], totals["bytes_after"]
        sizes = f"{before / GB:.3f} GB to {after / GB:.3f} GB"
        table.append([f"packed / dense, {part}", f"{after / before:.4f}", sizes])
    print_table(table)
    print("checked: {rows} rows, {tensors} untouched tensors".format(**results["checked"]))


if __name__ == "__main__":
    main()
