"""Compare greedy texts of a model whose weights stay packed with those of the same weights, dense.

    python benchmarks/check_greedy.py MODEL [--packed FOLDER]

MODEL is a dense folder in bfloat16 with a tokenizer; it is pruned at β = 1 into FOLDER, or into one
that is deleted at the end. Both ways round activations to bfloat16 after each step, at different
places, so neither gives the logits of exact arithmetic. Those of float32, with the same weights,
show how far each is off; the check fails

* if the packed logits are further off than dense ones by more than a tenth, as root of the mean
  square over all tokens that both texts have in common; the logit that is furthest off is printed
  too, but of millions it is a single one and a matter of chance;
* if two texts part at a token where the two best dense logits are further apart than both are off
  from float32's there.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import print_table, say
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging

import emp_llm

PROMPTS = (
    "The sky is blue because",
    "Once upon a time, in a village by the sea, there lived",
    "The capital of France is",
    "def fibonacci(n):\n",
    "In 1969, for the first time,",
    "To bake bread you need flour, water,",
    "The most important idea of Darwin's book is",
    "Dear Sir or Madam,\n\n",
    "A prime number is a number that",
    "It was a dark night, and the old house",
)
MARGIN = 1.1
"""How far packed logits may be off, in multiples of how far dense ones are."""


@dataclass(frozen=True)
class Written:
    """New tokens, int64 [n], and the logits that each was chosen by, float32 [n, V]."""

    ids: torch.Tensor
    logits: torch.Tensor


@dataclass(frozen=True)
class Compared:
    """The texts of one prompt.

    Attributes:
        common: Tokens that both have before they part.
        total: Tokens of each.
        off: By way, how far logits are from float32's: float32 [common or one more, V].
        apart: How far packed logits are from dense ones at most.
        gap: The best dense logit less that of the token that the packed way chose, where they part.
        allowed: How far both are off there together.
    """

    common: int
    total: int
    off: dict[str, torch.Tensor]
    apart: float
    gap: float | None
    allowed: float | None


def main() -> None:
    """Write the texts both ways, compare and print; exit status 1 if the check fails."""
    args = parse()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    with ExitStack() as stack:
        folder = args.packed or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "packed"
        if not folder.is_dir():
            emp_llm.prune(args.model, folder)
        tokenizer: Any = AutoTokenizer.from_pretrained(args.model)
        prompts = [tokenizer(text, return_tensors="pt").input_ids for text in PROMPTS]
        kept = emp_llm.EmpConfig(keep_packed=True)
        packed = AutoModelForCausalLM.from_pretrained(folder, quantization_config=kept)
        texts = [write(packed, ids, args.tokens) for ids in prompts]
        del packed
        dense = AutoModelForCausalLM.from_pretrained(folder)
        dense_texts = [write(dense, ids, args.tokens) for ids in prompts]
        exact = dense.float()
        found = [compare(exact, *one) for one in zip(prompts, texts, dense_texts, strict=True)]
    sys.exit(not report(found))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--packed", type=Path, metavar="FOLDER", help="the pruned model")
    parser.add_argument("--tokens", type=int, default=200, help="of each text (default: 200)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    if min(args.tokens, args.threads) < 1:
        parser.error("--tokens and --threads must be positive")
    return args


def write(model: PreTrainedModel, ids: torch.Tensor, tokens: int) -> Written:
    """Go on with a prompt, int64 [1, n]."""
    say(f"{tokens} tokens after {ids.shape[1]}")
    generate: Any = model.generate
    found = generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return Written(found.sequences[0, ids.shape[1] :], torch.cat(found.logits).float())


@torch.inference_mode()
def compare(
    exact: PreTrainedModel, prompt: torch.Tensor, packed: Written, dense: Written
) -> Compared:
    """Compare two texts up to where they part, and both with float32 on the same tokens."""
    differ = (packed.ids != dense.ids).nonzero()
    common = int(differ[0]) if len(differ) else len(dense.ids)
    seen = min(common + 1, len(dense.ids))  # at the token where they part both saw the same, too
    ids = torch.cat([prompt, dense.ids[None, :common]], dim=1)
    logits = exact(input_ids=ids).logits[0, prompt.shape[1] - 1 :][:seen]
    off = {
        name: (written.logits[:seen] - logits).abs()
        for name, written in (("packed", packed), ("dense", dense))
    }
    gap = allowed = None
    if len(differ):
        there = dense.logits[common]
        gap = float(there.max() - there[packed.ids[common]])
        allowed = float(sum(each[common].max() for each in off.values()))
    apart = float((packed.logits[:seen] - dense.logits[:seen]).abs().max())
    return Compared(common, len(dense.ids), off, apart, gap, allowed)


def report(found: list[Compared]) -> bool:
    """Print a line for each prompt, and all together; returns whether the check holds."""
    rows = [["prompt", "tokens in common", "packed off", "dense off", "apart", "gap", "allowed"]]
    for prompt, one in zip(PROMPTS, found, strict=True):
        parted = ["" if x is None else f"{x:.3f}" for x in (one.gap, one.allowed)]
        rows.append(
            [
                prompt.strip()[:24],
                f"{one.common} of {one.total}",
                *(f"{float(one.off[way].max()):.3f}" for way in ("packed", "dense")),
                f"{one.apart:.3f}",
                *parted,
            ]
        )
    print("logits: largest difference to float32's, and to each other; gap of the two best\n")
    print_table(rows)
    most, mean = (
        {way: measure([one.off[way] for one in found]) for way in ("packed", "dense")}
        for measure in (largest, root_mean_square)
    )
    for name, figures in (("at most", most), ("root of the mean square", mean)):
        print(
            f"off from float32, {name}: packed {figures['packed']:.4f}, dense "
            f"{figures['dense']:.4f}, ratio {figures['packed'] / figures['dense']:.3f}"
        )
    as_near = mean["packed"] <= MARGIN * mean["dense"]
    print(f"the ratio of the mean squares' roots is {'' if as_near else 'NOT '}at most {MARGIN:g}")
    within = all(one.gap is None or one.gap <= (one.allowed or 0) for one in found)
    print(f"where texts part, the gap is {'' if within else 'NOT '}within what is allowed")
    return within and as_near


def largest(parts: list[torch.Tensor]) -> float:
    """The largest of all numbers."""
    return max(float(part.max()) for part in parts)


def root_mean_square(parts: list[torch.Tensor]) -> float:
    """The root of the mean square of all numbers."""
    total = sum(float(part.double().square().sum()) for part in parts)
    return (total / sum(part.numel() for part in parts)) ** 0.5


if __name__ == "__main__":
    main()
