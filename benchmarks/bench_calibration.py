"""Measures the memory that calibration takes, in decoder blocks, and its time, in forwards.

    OMP_NUM_THREADS=1 python benchmarks/bench_calibration.py --folder SOME_FOLDER --json result.json

The model is a Llama of Gaussian bf16 weights, the text is random. Each criterion prunes the model
in a process of its own, which has pruned a tiny model by the same criterion before, so that
libraries and compiled kernels are in memory already. Memory is the peak of resident memory (VmHWM)
from loading the first decoder block until all masks are made, less what was resident before and
less the activations, divided by the bytes of a decoder block. For Taylor the activations are those
at every decoder block, which the backward walk needs; for repair, those of the dense model count as
well.

Time is that of the same phase, relative to two forwards of the whole model, in memory, on the same
samples; both are measured in turn.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import MB, print_table, say, spread, write_json

WAYS = ("wanda", "ria", "obs", "taylor", "magnitude + repair obs")
MOST_BLOCKS = 3
_CALIBRATING, _DONE = "calibrating", "pruning"
_ITEM = 2


def main() -> None:
    """Read the command line, measure, and print the results."""
    args = parse()
    if args.one is not None:
        print(json.dumps(one(args)))
        return
    folder = args.folder / "bench_calibration"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        make(folder / "model", args, args.layers, args.hidden, args.intermediate)
        make(folder / "tiny", args, 2, 64, 176)
        results = measure(folder, args)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    show(results)
    if args.json:
        names = ("layers", "hidden", "intermediate", "samples", "length", "vocabulary", "threads")
        write_json(args.json, "calibration", {n: getattr(args, n) for n in names}, results)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where to work; 5 GB")
    parser.add_argument("--layers", type=int, default=16, help="decoder blocks (default: 16)")
    parser.add_argument("--hidden", type=int, default=2048, help="default: 2048")
    parser.add_argument("--intermediate", type=int, default=5632, help="default: 5632")
    parser.add_argument("--vocabulary", type=int, default=500, help="tokens (default: 500)")
    parser.add_argument("--samples", type=int, default=8, help="default: 8")
    parser.add_argument("--length", type=int, default=256, help="tokens in one (default: 256)")
    parser.add_argument("--rounds", type=int, default=1, help="times each is run (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def make(
    folder: Path, args: argparse.Namespace, layers: int, hidden: int, intermediate: int
) -> None:
    """Write a model of Gaussian weights, a tokenizer that knows numbers, and a text of them."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    say(f"making {layers} blocks")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=args.length,
        dtype=torch.bfloat16,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="1GB")
    words = Tokenizer(models.WordLevel({str(i): i for i in range(args.vocabulary)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    ids = torch.randint(args.vocabulary, (4 * args.samples * args.length,)).tolist()
    (folder / "text.txt").write_text(" ".join(map(str, ids)), encoding="utf-8")


# --- the processes -------------------------------------------------------------------------------


def one(args: argparse.Namespace) -> dict[str, float]:
    """What a process of its own does: prune one way, or run the model forward."""
    import torch

    torch.set_num_threads(args.threads)
    if args.one == "forward":
        return forward_twice(args)
    prune(args, "tiny")
    return prune(args, "model").measured


class Watch:
    """Measures memory and time between two stages of progress."""

    def __init__(self) -> None:
        self.measured: dict[str, float] = {}
        self._start = 0.0, 0.0

    def begin(self, stage: str, _total: int, _unit: str = "B") -> None:
        """Begin before the first decoder block is loaded, and end once all masks are made."""
        if stage == _CALIBRATING and not self.measured:
            ctypes.CDLL(None).malloc_trim(0)  # what building the structure took does not count
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # VmHWM starts anew
            self.measured["baseline_bytes"] = resident("VmRSS")
            self._start = time.perf_counter(), time.process_time()
        elif stage == _DONE:
            self.measured["peak_bytes"] = resident("VmHWM")
            self.measured["seconds"] = time.perf_counter() - self._start[0]
            self.measured["cpu_seconds"] = time.process_time() - self._start[1]

    def advance(self, count: int) -> None:
        """Nothing."""


def prune(args: argparse.Namespace, model: str) -> Watch:
    """Prune a model one way."""
    import emp_llm
    from emp_llm.options import CalibrationOptions

    criterion, _, repair = args.one.partition(" + repair ")
    folder = args.folder / "bench_calibration"
    options = emp_llm.PruneOptions(
        criterion=criterion,
        repair=repair or "none",
        calibration=CalibrationOptions(
            text=str(folder / model / "text.txt"),
            samples=args.samples,
            length=args.length,
            device="cpu",
        ),
    )
    watch = Watch()
    out = folder / f"{model}-pruned"
    emp_llm.prune(folder / model, out, options, threads=args.threads, progress=watch)
    shutil.rmtree(out)
    return watch


def forward_twice(args: argparse.Namespace) -> dict[str, float]:
    """Two forwards of all samples through the whole model."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = args.folder / "bench_calibration" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids_NL = torch.randint(args.vocabulary, (args.samples, args.length))
    with torch.no_grad():
        model(input_ids=ids_NL[:1], use_cache=False)  # reads the weights, which are mapped
        start = time.perf_counter(), time.process_time()
        for _ in range(2):
            for ids_1L in ids_NL.split(1):
                model(input_ids=ids_1L, use_cache=False)
    return {
        "seconds": time.perf_counter() - start[0],
        "cpu_seconds": time.process_time() - start[1],
    }


def resident(field: str) -> int:
    """A field of /proc/self/status on this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


# --- the results ---------------------------------------------------------------------------------


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Prune every way, in turn with forwards."""
    rows: dict[str, list[dict[str, float]]] = {way: [] for way in args.ways}
    block = block_bytes(folder / "model")
    for _ in range(args.rounds):
        for way in args.ways:
            forward = run("forward")
            row = run(way)
            row["activation_bytes"] = activation_bytes(args, way)
            more = row["peak_bytes"] - row["baseline_bytes"] - row["activation_bytes"]
            row["blocks"] = more / block
            for clock in ("seconds", "cpu_seconds"):
                row[f"{clock}_ratio"] = row[clock] / forward[clock]
            rows[way].append(row)
            say(f"{way}: {json.dumps(row)}")
    of_all = {way: {k: spread([r[k] for r in rows[way]]) for k in rows[way][0]} for way in rows}
    return {"block_bytes": block, "ways": of_all}


def run(way: str) -> dict[str, float]:
    """Prune one way in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--one", way]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def block_bytes(folder: Path) -> int:
    """Bytes of the first decoder block's weights."""
    from emp_llm.checkpoint.checkpoint import open_checkpoint

    tensors = open_checkpoint(folder).tensors
    return sum(e.nbytes for name, (_, e) in tensors.items() if name.startswith("model.layers.0."))


def activation_bytes(args: argparse.Namespace, way: str) -> int:
    """Bytes of the activations that wait between decoder blocks, in bf16."""
    at_one_block = args.samples * args.length * args.hidden * _ITEM
    if way == "taylor":
        return at_one_block * (args.layers + 1)
    return at_one_block * (2 if "repair" in way else 1)


def show(results: dict[str, Any]) -> None:
    """Print the results."""
    print(f"a decoder block has {results['block_bytes'] / MB:.1f} MB")
    table = [["", "memory, blocks", "MB", "activations MB", "of 2 forwards", "of CPU time"]]
    for way, row in results["ways"].items():
        middle = {name: values["median"] for name, values in row.items()}
        more = middle["peak_bytes"] - middle["baseline_bytes"] - middle["activation_bytes"]
        numbers = [middle["blocks"], more / MB, middle["activation_bytes"] / MB]
        numbers += [middle["seconds_ratio"], middle["cpu_seconds_ratio"]]
        table.append([way, *(f"{x:.{d}f}" for x, d in zip(numbers, (2, 0, 0, 2, 2), strict=True))])
    print_table(table)
    most = max(row["blocks"]["median"] for row in results["ways"].values())
    print(f"{'within' if most < MOST_BLOCKS else 'ABOVE'} {MOST_BLOCKS} decoder blocks")


if __name__ == "__main__":
    main()
