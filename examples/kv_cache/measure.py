"""Perplexity of a model whose cache drops entries, by three rules, at the same mean bytes.

    python examples/kv_cache/measure.py MODEL TEXT --json kv_cache.json

The text is read window by window, a few tokens in each forward pass; after each pass the rule drops
entries. For each β, the other rules get the count with which their caches hold, on average over
all passes, as many entries.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import torch
from effective_cache import (
    ATTENTION,
    ByBudget,
    ByEffectiveNumber,
    ByWindow,
    EffectiveCache,
    Rule,
)
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def main() -> None:
    """Read the command line, measure all rules, print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a folder or a model of the Hub")
    parser.add_argument("text", type=Path, help="a file of text")
    parser.add_argument("--beta", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--recent", type=int, default=32)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--step", type=int, default=16, help="tokens of a forward pass")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(
        args.model, attn_implementation=ATTENTION, dtype=torch.float32
    )
    tokens = AutoTokenizer.from_pretrained(args.model)(args.text.read_text("utf-8")).input_ids
    starts = range(0, args.windows * args.length, args.length)
    windows = [torch.tensor([tokens[at : at + args.length]]) for at in starts]
    rows = [measured("all", None, ByBudget(args.length), model, windows, args.step)]
    for beta in args.beta:
        rule = ByEffectiveNumber(beta, args.recent)
        rows.append(measured("N_eff", beta, rule, model, windows, args.step))
        count = count_for(rows[-1]["entries"], args.length, args.step)
        for name, other in (("H2O", ByBudget(count)), ("window", ByWindow(count))):
            rows.append(measured(name, count, other, model, windows, args.step))
        if args.json:
            content = {"arguments": vars(args), "rows": rows}
            args.json.write_text(json.dumps(content, indent=2, default=str) + "\n")


def measured(
    name: str,
    amount: float | None,
    rule: Rule,
    model: PreTrainedModel,
    windows: list[torch.Tensor],
    step: int,
) -> dict[str, float | str | None]:
    """Mean entries of a head, bytes of all, and the perplexity, of one rule."""
    losses, entries, nbytes = [], [], []
    for window in windows:
        cache = EffectiveCache(model.config, rule)
        logits = []
        for start, stop in pairwise([*range(0, window.shape[1], step), window.shape[1]]):
            with torch.no_grad():
                found = model(input_ids=window[:, start:stop], past_key_values=cache)
            logits.append(found.logits[0])
            heads = model.config.num_hidden_layers * model.config.num_key_value_heads
            entries.append(cache.entries / heads)
            nbytes.append(cache.nbytes)
        losses.append(cross_entropy(torch.cat(logits)[:-1], window[0, 1:]).item())
    row = {
        "rule": name,
        "amount": amount,
        "entries": mean(entries),
        "bytes": mean(nbytes),
        "perplexity": math.exp(mean(losses)),
    }
    shown = "" if amount is None else f"{amount:g}"
    print(
        f"{name:8} {shown:>6} {row['entries']:8.1f} entries a head "
        f"{row['bytes'] / 1e6:8.2f} MB  perplexity {row['perplexity']:8.3f}",
        flush=True,
    )
    return row


def count_for(entries: float, length: int, step: int) -> int:
    """The count with which caches hold so many entries on average, when each pass is over."""
    seen = [*range(step, length, step), length]
    return min(range(2, length + 1), key=lambda n: abs(mean(min(n, t) for t in seen) - entries))


if __name__ == "__main__":
    main()
