"""Times perplexity beside the model's forward on the same batches, and counts its memory.

    OMP_NUM_THREADS=1 python benchmarks/bench_eval.py --json result.json

The model is a Llama with random weights, its tokenizer has a token for every word. Two ways run in
turn in one process: `perplexity`, and the model's forward on the same windows, whose logits are not
used. Each is timed by the clock and in processor time, which other work on the machine disturbs
less. Before a number is printed, the perplexity is checked against the losses that the model itself
computes from labels. Memory is measured in processes of their own.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import MB, print_table, say, spread, write_json

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

WAYS = ("forward", "perplexity")
CLOCKS = {"seconds": time.perf_counter, "cpu_seconds": time.process_time}


def main() -> None:
    """Reads the command line, measures, checks and reports."""
    args = parse()
    if args.peak:
        print(json.dumps(peak(args)))
        return
    results = measure(args)
    for way in WAYS:
        command = [sys.executable, __file__, *sys.argv[1:], "--peak", way]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        results["peak_bytes"][way] = json.loads(done.stdout)
    report(results)
    if args.json:
        settings = {key: getattr(args, key) for key in ("dtype", "device", "context", "blocks")}
        sizes = {key: getattr(args, key) for key in ("hidden", "layers", "vocabulary")}
        write_json(args.json, "eval", settings | sizes, results)


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=768, help="hidden size (default: 768)")
    parser.add_argument("--layers", type=int, default=8, help="decoder blocks (default: 8)")
    parser.add_argument("--vocabulary", type=int, default=32000, help="tokens (default: 32000)")
    parser.add_argument("--context", type=int, default=1024, help="tokens in a window")
    parser.add_argument("--blocks", type=int, default=1, help="windows of text (default: 1)")
    parser.add_argument("--rounds", type=int, default=9, help="times each is run (default: 9)")
    parser.add_argument("--dtype", default="float32", help="of the weights (default: float32)")
    parser.add_argument("--device", default="cpu", help="where it runs (default: cpu)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def make(args: argparse.Namespace) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, str]:
    """A model, its tokenizer, and a text of so many windows."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        max_position_embeddings=args.context,
    )
    model = LlamaForCausalLM(config).to(args.device, getattr(torch, args.dtype)).eval()
    words = Tokenizer(models.WordLevel({str(i): i for i in range(args.vocabulary)}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ids = torch.randint(args.vocabulary, (args.blocks * args.context,)).tolist()
    return model, PreTrainedTokenizerFast(tokenizer_object=words), " ".join(map(str, ids))


def batches(args: argparse.Namespace, text: str) -> list[torch.Tensor]:
    """The windows that the text consists of."""
    import torch

    ids = torch.tensor([int(word) for word in text.split()], device=args.device)
    return [window[None] for window in ids.split(args.context)]


def forward(model: LlamaForCausalLM, windows: list[torch.Tensor]) -> None:
    """What cannot be done without."""
    import torch

    with torch.no_grad():
        for window in windows:
            model(input_ids=window, use_cache=False)
    if windows[0].is_cuda:
        torch.cuda.synchronize()


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Time both ways in turn, after a round that does not count."""
    import torch

    from emp_llm.evaluation.perplexity import perplexity

    model, tokenizer, text = make(args)
    windows = batches(args, text)
    with torch.no_grad():
        losses = [model(input_ids=window, labels=window).loss.item() for window in windows]
    expected = math.exp(math.fsum(losses) / len(losses))
    found = perplexity(model, tokenizer, text, context=args.context)
    if not math.isclose(found.perplexity, expected, rel_tol=1e-4):
        raise AssertionError(f"perplexity {found.perplexity}, by the model's losses {expected}")
    ways = {
        "forward": lambda: forward(model, windows),
        "perplexity": lambda: perplexity(model, tokenizer, text, context=args.context),
    }
    times: dict[str, dict[str, list[float]]] = {
        way: {clock: [] for clock in CLOCKS} for way in WAYS
    }
    for number in range(args.rounds):
        for way, run in ways.items():
            starts = {clock: now() for clock, now in CLOCKS.items()}
            run()
            for clock, now in CLOCKS.items():
                times[way][clock].append(now() - starts[clock])
        say(f"round {number + 1} of {args.rounds}")
    return {
        "parameters": model.num_parameters(),
        "weights_bytes": sum(weights.nbytes for weights in model.parameters()),
        "logits_bytes": args.context * args.vocabulary * model.dtype.itemsize,
        "tokens": len(windows) * args.context,
        "times": {
            way: {clock: spread(all_) for clock, all_ in of.items()} for way, of in times.items()
        },
        "ratios": {clock: spread(ratios(times, clock)) for clock in CLOCKS},
        "peak_bytes": {},
    }


def ratios(times: dict[str, dict[str, list[float]]], clock: str) -> list[float]:
    """What measuring took over the forward beside it, round by round."""
    pairs = zip(times["perplexity"][clock], times["forward"][clock], strict=True)
    return [ours / alone for ours, alone in pairs]


def peak(args: argparse.Namespace) -> int:
    """The most memory that one way had at once beyond what was there before it, in bytes."""
    import torch

    from emp_llm.evaluation.perplexity import perplexity

    model, tokenizer, text = make(args)
    windows = batches(args, text)
    if windows[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resident("VmRSS")
    if args.peak == "forward":
        forward(model, windows)
    else:
        perplexity(model, tokenizer, text, context=args.context)
    after = torch.cuda.max_memory_allocated() if windows[0].is_cuda else resident("VmHWM")
    return after - before


def resident(field: str) -> int:
    """A field of this process's memory in /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def report(results: dict[str, Any]) -> None:
    """Prints medians, and of the ratio its range."""
    print(
        f"{results['parameters'] / 1e6:.0f} M parameters in {results['weights_bytes'] / MB:.0f} "
        f"MB, {results['tokens']} tokens, logits of a window {results['logits_bytes'] / MB:.0f} MB"
    )
    table = [["", "seconds", "CPU seconds", "tokens/s", "more memory MB"]]
    for way in WAYS:
        seconds = results["times"][way]["seconds"]["median"]
        table.append(
            [
                way,
                f"{seconds:.2f}",
                f"{results['times'][way]['cpu_seconds']['median']:.2f}",
                f"{results['tokens'] / seconds:.0f}",
                f"{results['peak_bytes'][way] / MB:.0f}",
            ]
        )
    print_table(table)
    for clock, ratio in results["ratios"].items():
        low, high = min(ratio["all"]), max(ratio["all"])
        print(f"ratio of {clock} {ratio['median']:.3f} ({low:.3f}-{high:.3f})")
    print("checked: the perplexity is that of the model's own losses")


if __name__ == "__main__":
    main()
