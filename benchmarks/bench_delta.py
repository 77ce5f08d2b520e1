"""Deltas of a fine-tuned model: EMP's count and weights beside a rate, chosen at random (DARE).

    python benchmarks/bench_delta.py --json benchmarks/results/delta.json

`demo/model` is fine-tuned for a minute on the beginning of `second_text.py`'s text, and measured on
its end. Then its difference to the base is cut to as many weights in three ways:

- EMP: ⌊β · N_eff⌋ differences of each row, sampled, by ``emp-llm prune --base``;
- largest: the same share of each row, its largest differences as they are;
- DARE (arXiv 2311.03099): the same share of each tensor at random, those that stay divided by the
  share; the mean of five seeds.

The loss of EMP's is that of what ``emp-llm unpack`` writes. A random choice need not be stored,
only its seed, so DARE's bytes are two for each weight that stays; EMP's are those of the packed
file; in both cases with the tensors that are not pruned.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

import torch
from common import print_table, say, write_json
from safetensors.torch import load_file
from second_text import second_text
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from emp_llm import PruneOptions, prune, unpack

if TYPE_CHECKING:
    from collections.abc import Callable

WINDOW, BATCH, RATE, SEEDS = 128, 8, 3e-4, 5
BETAS, TARGETS = (1.0, 0.5, 0.25, 0.1), ("mlp", "all-linear")

Tensors = dict[str, torch.Tensor]
Model = Any


def main() -> None:
    """Read the command line, fine-tune, cut the difference in each way and print the losses."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, default=Path("demo/model"))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    train, test = texts(args.model)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        seconds = fine_tune(args.model, train, args.steps, folder / "tuned")
        base, tuned = (load_file(f / "model.safetensors") for f in (args.model, folder / "tuned"))
        model = AutoModelForCausalLM.from_pretrained(folder / "tuned", dtype=torch.float32)
        losses = {"base": loss_of(model, base, test), "tuned": loss_of(model, tuned, test)}
        say(f"fine-tuned in {seconds:.0f} s: loss {losses['base']:.3f} -> {losses['tuned']:.3f}")
        rows = [
            row
            for targets in TARGETS
            for beta in BETAS
            for row in compared(args.model, folder, targets, beta, base, tuned, model, test)
        ]
    print_table([list(rows[0]), *([_shown(value) for value in row.values()] for row in rows)])
    if args.json:
        settings = {"model": str(args.model), "steps": args.steps, "rate": RATE, "seeds": SEEDS}
        write_json(args.json, "delta", settings, {"losses": losses, "rows": rows})


def _shown(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else "" if value is None else f"{value}"


def texts(model: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of tokens, int64 [windows, WINDOW]: of four fifths of the text, and of the last."""
    tokens = AutoTokenizer.from_pretrained(model)(second_text(), return_tensors="pt")["input_ids"][
        0
    ]
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    cut = len(windows) * 4 // 5
    return windows[:cut], windows[cut:]


def fine_tune(model: Path, train: torch.Tensor, steps: int, out: Path) -> float:
    """Train all weights in float32, save them in the model's own dtype; returns the seconds."""
    torch.manual_seed(0)
    tuned = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=RATE, weight_decay=0.0)
    began = time.perf_counter()
    for _ in range(steps):
        batch = train[torch.randint(len(train), (BATCH,))]
        loss(tuned, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    tuned.to(torch.bfloat16).save_pretrained(out)
    return time.perf_counter() - began


def loss(model: Model, windows: torch.Tensor) -> torch.Tensor:
    """The mean loss in nats per token, float32 []."""
    logits = model(input_ids=windows).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def loss_of(model: Model, tensors: Tensors, test: torch.Tensor) -> float:
    """The loss of a model with other weights; computed in float32."""
    model.load_state_dict(tensors, strict=False)
    return mean(loss(model, windows).item() for windows in test.split(BATCH))


def compared(
    model_path: Path,
    folder: Path,
    targets: str,
    beta: float,
    base: Tensors,
    tuned: Tensors,
    model: Model,
    test: torch.Tensor,
) -> list[dict[str, object]]:
    """One row for each way to choose as many weights."""
    delta, whole = folder / f"{targets}-{beta}", folder / f"{targets}-{beta}-whole"
    options = PruneOptions(beta=beta, targets=targets)
    report = prune(folder / "tuned", delta, options, base=model_path)
    unpack(delta, whole)
    emp = loss_of(model, load_file(whole / "model.safetensors"), test)
    totals = report["totals"]["targets"]
    names = [name for name, fields in report["tensors"].items() if fields["pruned"]]
    share = totals["kept"] / totals["weights"]

    def loss_with(cut: Callable[[torch.Tensor], torch.Tensor]) -> float:
        sums = {n: (base[n].float() + cut(tuned[n].float() - base[n].float())) for n in names}
        return loss_of(model, {**tuned, **{n: t.bfloat16() for n, t in sums.items()}}, test)

    def largest(less: torch.Tensor) -> torch.Tensor:
        count = max(1, round(share * less.shape[1]))
        places = less.abs().topk(count, dim=1).indices
        return torch.zeros_like(less).scatter(1, places, less.gather(1, places))

    random = []
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)

        def dare(less: torch.Tensor, generator: torch.Generator = generator) -> torch.Tensor:
            return less * (torch.rand(less.shape, generator=generator) < share) / share

        random.append(loss_with(dare))
    whole_bytes = report["totals"]["model"]["bytes_after"]
    rest = whole_bytes - totals["bytes_after"]
    same = {"targets": targets, "beta": beta, "kept": share}
    none: dict[str, object] = {"deviation": None, "bytes": None}
    return [
        {**same, "choice": "EMP", "loss": emp, **none, "bytes": whole_bytes},
        {**same, "choice": "largest", "loss": loss_with(largest), **none},
        {
            **same,
            "choice": "DARE",
            "loss": mean(random),
            "deviation": stdev(random),
            "bytes": 2 * totals["kept"] + rest,
        },
    ]


if __name__ == "__main__":
    main()
