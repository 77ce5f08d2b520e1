"""Trains the small Llama of `demo/model` on WikiText-2, from random weights, on a CPU.

    python benchmarks/train_demo_model.py path/to/wikitext-2 --out demo/model

The folder holds `train.txt` and `valid.txt`. The model that is shipped was made by this command
with the defaults below, in half an hour on two busy cores. Everything random comes from `--seed`,
but sums by several threads differ in their last bits, so another run learns as well and not the
same bits: three runs had mean losses of 5.608, 5.608 and 5.610 over steps 101 to 200.

- Tokenizer: byte-level BPE learnt from `train.txt`. `<unk>`, which WikiText-2 puts in place of
  rare words, is a word like any other (`" <unk>"` is one ordinary token), so decoding gives back
  the text exactly. `<|endoftext|>` stands before each article.
- Model: Llama with tied embeddings and grouped-query attention; most of its weights are in MLPs.
- Training: windows at random places of the text, AdamW, linear warm-up, then linear decay to 0.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from emp_llm.evaluation.perplexity import Perplexity, perplexity

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    """The loss of a batch: its token ids, and the same one token later, [windows, tokens]."""

END = "<|endoftext|>"
WORDS = r" ?<unk>| ?'(?:s|t|re|ve|m|ll|d)\b| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ARTICLE = re.compile(r"(?m)^(?= = [^=\n]+ = $)")
VOCABULARY, CONTEXT, BATCH = 2048, 256, 8
PEAK_RATE, WARMUP = 3e-3, 200

CARD = """\
---
license: cc-by-sa-3.0
language: en
library_name: transformers
---
# A small Llama to try emp-llm on

{parameters:,} parameters in bfloat16 ({mlp:.0%} of them in MLPs): {layers} layers, {hidden} wide,
a vocabulary of {vocabulary:,}, tied embeddings, {context} positions. Trained from random weights by
`benchmarks/train_demo_model.py` on the training text of WikiText-2, {steps:,} steps of {batch:,}
tokens each.

It is there so that pruning, packing, loading and evaluation can be tried in seconds and without a
network. It writes grammatical nonsense and is of no other use.

Perplexity on the whole validation text of WikiText-2, per token of this vocabulary, in blocks of
{context} tokens: **{valid.perplexity:.2f}** ({valid.bits_per_byte:.3f} bits per byte).

Data: WikiText-2, S. Merity, C. Xiong, J. Bradbury and R. Socher, "Pointer Sentinel Mixture Models"
(2016), text by the authors of Wikipedia, licensed CC BY-SA 3.0
(https://creativecommons.org/licenses/by-sa/3.0/). The model, its tokenizer and this card are
offered under the same licence.
"""


def main() -> None:
    """Reads the command line, then trains, writes and measures what it wrote."""
    args = parse()
    torch.manual_seed(args.seed)
    articles = ARTICLE.split((args.data / "train.txt").read_text(encoding="utf-8"))
    tokenizer = learn_tokenizer(articles)
    ids = encode(tokenizer, articles)
    model = build()
    print(f"{len(ids):,} training tokens, {model.num_parameters():,} parameters", flush=True)
    train(model, compiled_loss(model), ids, args)
    model.bfloat16().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    written = LlamaForCausalLM.from_pretrained(args.out)
    valid_text = (args.data / "valid.txt").read_text(encoding="utf-8")
    valid = perplexity(written, tokenizer, valid_text, context=CONTEXT)
    print(f"valid: {valid}", flush=True)
    (args.out / "README.md").write_text(card(model, valid, args.steps), encoding="utf-8")


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with train.txt and valid.txt")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--checkpoint", type=Path, help="file to save to, and to resume from")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def learn_tokenizer(articles: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; any text decodes to itself."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(articles, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, articles: list[str]) -> torch.Tensor:
    """All articles as one row of token ids, the end token before each."""
    rows = tokenizer([END + article for article in articles], verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in row])


def build() -> LlamaForCausalLM:
    """The model with random weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=480,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def train(
    model: PreTrainedModel, loss_of: Loss, ids: torch.Tensor, args: argparse.Namespace
) -> None:
    """Trains in place; resumes from the checkpoint if there is one."""
    matrices = {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1}
    norms = {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([matrices, norms], lr=PEAK_RATE, betas=(0.9, 0.95), fused=True)
    first = restore(args.checkpoint, model, optimizer)
    started, running = time.perf_counter(), 0.0
    for step in range(first, args.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args.steps)
        loss = loss_of(*batch(ids, args.seed + step))
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running += loss.item() / 100
        if (step + 1) % 100 == 0:
            seconds = time.perf_counter() - started
            speed = (step + 1 - first) * BATCH * CONTEXT / seconds
            print(f"step {step + 1}: loss {running:.4f}, {speed:,.0f} tokens/s", flush=True)
            running = 0.0
        if args.checkpoint and ((step + 1) % 500 == 0 or step + 1 == args.steps):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": step + 1}, args.checkpoint)


def restore(file: Path | None, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> int:
    """Loads the checkpoint if there is one; returns the steps already done."""
    if file is None or not file.exists():
        return 0
    state = torch.load(file)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def compiled_loss(model: LlamaForCausalLM) -> Loss:
    """Mean loss of a batch, its matrix products in bfloat16."""

    def loss(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=inputs, use_cache=False).logits
        return cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    return torch.compile(loss)


def rate(step: int, steps: int) -> float:
    """Learning rate: up over the first WARMUP steps, then down to 0 at the last."""
    return PEAK_RATE * min((step + 1) / WARMUP, (steps - step) / max(1, steps - WARMUP))


def batch(ids: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """BATCH windows at random places, and the same one token later."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - CONTEXT, (BATCH, 1), generator=generator)
    windows = ids[starts + torch.arange(CONTEXT + 1)]
    return windows[:, :-1], windows[:, 1:]


def card(model: LlamaForCausalLM, valid: Perplexity, steps: int) -> str:
    """The model card."""
    mlp = sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name)
    return CARD.format(
        parameters=model.num_parameters(),
        mlp=mlp / model.num_parameters(),
        layers=model.config.num_hidden_layers,
        hidden=model.config.hidden_size,
        vocabulary=VOCABULARY,
        context=CONTEXT,
        batch=BATCH * CONTEXT,
        steps=steps,
        valid=valid,
    )


if __name__ == "__main__":
    main()
