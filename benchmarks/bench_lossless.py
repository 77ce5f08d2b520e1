"""Compares `emp-llm pack` and `unpack` with ZipNN: bytes, speed and memory on the same tensors.

    python -m venv zipnn-env
    zipnn-env/bin/pip install zipnn safetensors torch
    python benchmarks/bench_lossless.py --folder SOME_FOLDER --zipnn zipnn-env/bin/python \
        MODEL ... --json result.json

ZipNN gets an environment of its own, as its requirements are not emp-llm's. MODEL are folders with
safetensors files; besides them a Gaussian checkpoint of LLaMA-2-7B's shapes is made. Two things are
measured. The coders: all tensors from memory to memory, in processes that take turns. The commands:
from files to flushed files, from start to exit, with all imports. What comes back is compared with
the source in both.

Next to the bytes stands a limit: sign and mantissa as they are, and the entropy of the exponents of
each tensor. No code that gives each exponent of a tensor its own bits can do better; one that looks
at more than the exponent can. CPU seconds are of all threads together: they depend less on what
else the machine does than seconds. Of each the best round counts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import GB, MB, make_checkpoint, prepare_cache, print_table, say, write_json
from lossless_code import number_format_of
from lossless_worker import check_same, read_tensors
from timed_process import run

HERE = Path(__file__).parent
CODERS = ("emp-llm", "zipnn")
STEPS = ("encode", "decode")
COMMANDS = ("pack", "unpack")


def main() -> None:
    """Measure model by model, and print."""
    args = parse()
    folder = args.folder / "bench_lossless"
    results = {}
    try:
        gaussian = folder / "gaussian"
        models = dict(zip(args.names or [m.name for m in args.models], args.models, strict=True))
        if args.layers:
            make_checkpoint(gaussian, layers=args.layers, dtype="bf16", shard_bytes=5 * GB, room=3)
            models[f"Gaussian, {args.layers} layers"] = gaussian
        for name, model in models.items():
            say(name)
            results[name] = measure(model, folder / "work", args)
            print_result(name, results[name])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        settings = {
            "rounds": args.rounds,
            "command_rounds": args.command_rounds,
            "threads": args.threads,
            "zipnn": args.zipnn_version,
        }
        write_json(args.json, "lossless", settings, results)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("models", nargs="*", type=Path, metavar="MODEL")
    parser.add_argument("--names", nargs="*", help="what to call the models in the results")
    parser.add_argument("--folder", type=Path, required=True, help="where to work")
    parser.add_argument("--zipnn", required=True, metavar="PYTHON", help="python with zipnn")
    parser.add_argument("--layers", type=int, default=1, help="of the Gaussian checkpoint; 0: none")
    parser.add_argument("--rounds", type=int, default=5, help="times each coder runs (default: 5)")
    parser.add_argument(
        "--command-rounds", type=int, default=3, help="times each command runs (default: 3)"
    )
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--threads", nargs="+", type=int, default=sorted({1, cores}))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    args = parser.parse_args()
    if min(args.rounds, args.command_rounds) < 1 or min(args.threads) < 1 or args.layers < 0:
        parser.error("rounds and --threads must be positive, --layers not negative")
    if args.names and len(args.names) != len(args.models):
        parser.error("--names must be as many as the models")
    version = "import importlib.metadata as m; print(m.version('zipnn'))"
    command = [args.zipnn, "-c", version]
    args.zipnn_version = subprocess.run(
        command, check=True, capture_output=True, text=True
    ).stdout.strip()
    return args


def measure(model: Path, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one model."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    tensors = read_tensors(model)
    coders = {threads: time_coders(model, threads, args) for threads in args.threads}
    first = coders[args.threads[0]]
    sizes = {coder: first[coder]["encode"].pop("bytes") for coder in CODERS}
    for other in args.threads[1:]:
        for coder in CODERS:
            del coders[other][coder]["encode"]["bytes"]
    return {
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "kinds": kinds(tensors, sizes),
        "coders": coders,
        "commands": {
            threads: time_commands(model, tensors, work, threads, args) for threads in args.threads
        },
    }


# --- bytes ---------------------------------------------------------------------------------------


def kinds(
    tensors: dict[str, torch.Tensor], sizes: dict[str, dict[str, int]]
) -> dict[str, dict[str, float]]:
    """Bytes of the tensors of each kind, such as "q_proj", and of all: dense, coded, the limit."""
    found: dict[str, dict[str, float]] = {}
    for name, tensor in tensors.items():
        figures = {"dense": tensor.nbytes, "limit": limit(tensor)}
        figures |= {coder: sizes[coder][name] for coder in CODERS}
        for kind in (name.split(".")[-2:][0] if tensor.dim() > 1 else "vectors", "all"):
            total = found.setdefault(kind, dict.fromkeys(figures, 0))
            for key, value in figures.items():
                total[key] += value
    return found


def limit(tensor: torch.Tensor) -> float:
    """Bytes of a tensor if its exponents took their entropy and the other bits themselves."""
    number_format = number_format_of(tensor)
    if number_format is None:
        return tensor.nbytes
    flat = tensor.reshape(-1).view(torch.uint8).numpy().view(number_format.storage)
    magnitudes = flat & flat.dtype.type(number_format.key_mask)
    counts = np.bincount(magnitudes >> flat.dtype.type(number_format.mantissa_bits))
    shares = counts[counts > 0] / flat.size
    bits = 1 + number_format.mantissa_bits - float((shares * np.log2(shares)).sum())
    return flat.size * bits / 8


# --- times ---------------------------------------------------------------------------------------


def time_coders(model: Path, threads: int, args: argparse.Namespace) -> dict[str, Any]:
    """Best seconds of both coders, by coder and step; the first round, for warming, is left out."""
    found: dict[str, Any] = {coder: {step: [] for step in STEPS} for coder in CODERS}
    with ExitStack() as stack:
        workers = {
            coder: stack.enter_context(worker(coder, model, threads, args)) for coder in CODERS
        }
        for number in range(args.rounds + 1):
            for step in STEPS:
                for coder, process in workers.items():
                    answer = ask(process, step)
                    if number:
                        found[coder][step].append(answer)
        for process in workers.values():
            process.stdin.close()
    return {coder: {step: best(found[coder][step]) for step in STEPS} for coder in CODERS}


def worker(
    coder: str, model: Path, threads: int, args: argparse.Namespace
) -> subprocess.Popen[str]:
    """Start a coder's process."""
    python = args.zipnn if coder == "zipnn" else sys.executable
    command = [python, HERE / "lossless_worker.py", coder, model, str(threads)]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(coder),
    )


def environment(coder: str) -> dict[str, str]:
    """Our process sees what this one does; ZipNN's only what is installed beside it."""
    own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return own if coder == "zipnn" else dict(os.environ)


def ask(process: subprocess.Popen[str], step: str) -> dict[str, Any]:
    """Have a process do something; returns its answer."""
    if process.stdin is None or process.stdout is None:
        raise AssertionError("pipes were asked for")
    process.stdin.write(f"{step}\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"the coder's process ended with status {process.wait()}")
    answer: dict[str, Any] = json.loads(line)
    return answer


def best(answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The least of each figure; of what is no number, the last."""
    return {
        key: min(answer[key] for answer in answers) if isinstance(value, float | int) else value
        for key, value in answers[-1].items()
    }


def time_commands(
    model: Path,
    tensors: dict[str, torch.Tensor],
    work: Path,
    threads: int,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Best of whole processes, by coder and command: seconds, CPU seconds, peak and file bytes.

    None is left out for warming: the coders have warmed what is kept between processes.
    """
    found: dict[str, Any] = {coder: {command: [] for command in COMMANDS} for coder in CODERS}
    for _ in range(args.command_rounds):
        for command in COMMANDS:
            for coder in CODERS:
                packed, dense = work / f"{coder}-packed", work / f"{coder}-dense"
                source, new = (model, packed) if command == "pack" else (packed, dense)
                shutil.rmtree(new, ignore_errors=True)
                os.sync()
                prepare_cache(sorted(source.glob("*.safetensors")), cold=False)
                figures = time_command(coder, command, source, new, threads, args)
                found[coder][command].append(figures)
    for coder in CODERS:
        check_same(read_tensors(work / f"{coder}-dense"), tensors)
    return {
        coder: {command: best(found[coder][command]) for command in COMMANDS} for coder in CODERS
    }


def time_command(
    coder: str, command: str, source: Path, new: Path, threads: int, args: argparse.Namespace
) -> dict[str, float]:
    """Time one process from start to exit."""
    words = [command, str(source), str(new), str(threads)]
    ours = [command, str(source), "--out", str(new), "--threads", str(threads), "--json"]
    if coder == "zipnn":
        unset = ["env", "-u", "PYTHONPATH"]
        timed = run([*unset, args.zipnn, str(HERE / "zipnn_files.py"), *words])
    else:
        timed = run([sys.executable, "-m", "emp_cli", *ours])
    return {
        "seconds": timed.seconds,
        "cpu_seconds": timed.user_seconds + timed.system_seconds,
        "peak_bytes": timed.peak_bytes,
        "file_bytes": sum(path.stat().st_size for path in new.glob("*.safetensors")),
    }


# --- results ----------------------------------------------------------------------------------


def print_result(name: str, result: dict[str, Any]) -> None:
    """Print the tables of a model."""
    nbytes = result["bytes"]
    print(f"\n{name}: {nbytes / MB:.1f} MB. Bytes / dense bytes, by kind of tensor")
    rows = [["", "MB", *CODERS, "limit"]]
    for kind, figures in result["kinds"].items():
        ratios = [f"{figures[key] / figures['dense']:.4f}" for key in (*CODERS, "limit")]
        rows.append([kind, f"{figures['dense'] / MB:.1f}", *ratios])
    print_table(rows)
    print("\nMemory to memory: GB/s of dense weights, by seconds and by CPU seconds")
    rows = [["", *(f"{coder} {step}" for step in STEPS for coder in CODERS)]]
    for threads, coders in result["coders"].items():
        for key in ("seconds", "cpu_seconds"):
            cells = [f"{nbytes / GB / coders[c][s][key]:.2f}" for s in STEPS for c in CODERS]
            rows.append([f"{threads} threads, {key.replace('_', ' ')}", *cells])
    print_table(rows)
    print("\nCommands, from start to exit")
    rows = [["", "seconds", "CPU seconds", "peak MB", "file bytes / dense"]]
    for threads, commands in result["commands"].items():
        for command in COMMANDS:
            for coder in CODERS:
                f = commands[coder][command]
                cells = [f"{f['seconds']:.2f}", f"{f['cpu_seconds']:.2f}"]
                cells += [f"{f['peak_bytes'] / MB:.0f}", f"{f['file_bytes'] / nbytes:.4f}"]
                rows.append([f"{coder} {command}, {threads} threads", *cells])
    print_table(rows)


if __name__ == "__main__":
    main()
