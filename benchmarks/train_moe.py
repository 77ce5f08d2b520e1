"""Trains a small mixture of experts on WikiText-2, from random weights, on one core.

    python benchmarks/train_moe.py wikitext2 --out moe
    python benchmarks/train_moe.py path/to/train.txt --measure path/to/valid.txt --out moe

It is there to measure what fewer experts cost: a model with random weights, as the tests have them,
has experts that say nothing. Its tokenizer, batches and optimizer are those of the demo's model.

- Model: Qwen3-MoE, 10.2 M parameters: 4 layers of 16 experts, of which each token takes 2.
- Loss: cross entropy, and the load-balancing loss of Switch Transformer (arXiv 2101.03961, as in
  `transformers`) so that no expert is left without tokens.
- Everything random comes from `--seed`; the checkpoint is in bfloat16.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from train_demo_model import ARTICLE, CONTEXT, VOCABULARY, encode, learn_tokenizer, train
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from emp_llm.evaluation.perplexity import perplexity
from emp_llm.texts.texts import read_text

BALANCE = 0.01


def main() -> None:
    """Reads the command line, then trains, writes and measures what it wrote."""
    args = parse()
    torch.manual_seed(args.seed)
    articles = ARTICLE.split(read_text(args.text, protocol="paper", part="train").text)
    tokenizer = learn_tokenizer(articles)
    ids = encode(tokenizer, articles)
    model = build()
    print(f"{len(ids):,} training tokens, {model.num_parameters():,} parameters", flush=True)

    def loss(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        output = model(input_ids=inputs, use_cache=False, output_router_logits=True)
        predicting = cross_entropy(output.logits.flatten(0, 1), targets.flatten())
        balance: torch.Tensor = output.aux_loss
        return predicting + BALANCE * balance

    train(model, loss, ids, args)
    model.bfloat16().save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    written = Qwen3MoeForCausalLM.from_pretrained(args.out)
    measured = read_text(args.measure or args.text, protocol="paper")
    print(perplexity(written, tokenizer, measured, context=CONTEXT))


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="wikitext2, or a file: the text to learn")
    parser.add_argument("--measure", help="a file to measure on; by default wikitext2's test part")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--checkpoint", type=Path, help="file to save to, and to resume from")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def build() -> Qwen3MoeForCausalLM:
    """The model with random weights."""
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        moe_intermediate_size=256,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        router_aux_loss_coef=BALANCE,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return Qwen3MoeForCausalLM(config)


if __name__ == "__main__":
    main()
