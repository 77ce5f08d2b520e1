"""How well a model predicts a text: the protocol behind the perplexities that pruning papers print.

Shapes in names: n tokens of one block, V the size of the vocabulary.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emp_llm.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["Perplexity", "perplexity"]

_SLICE_ELEMENTS = 1 << 24  # logits in float32 at a time: 64 MiB, whatever the vocabulary


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """What `perplexity` measured.

    Attributes:
        perplexity: exp(nats_per_token); inf where that overflows, NaN where a loss is NaN.
        nats_per_token: mean of the blocks' mean losses, each weighted by its number of tokens.
        bits_per_byte: bits spent on all predicted tokens, per byte of the text in UTF-8. Unlike
            the perplexity it can be compared between models of different tokenizers.
        tokens: tokens in the blocks that were scored.
        context: tokens in a full block.
    """

    perplexity: float
    nats_per_token: float
    bits_per_byte: float
    tokens: int
    context: int


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    context: int = 2048,
) -> Perplexity:
    """Measures the perplexity of a causal language model on a text.

    The text is tokenized once, with the special tokens that the tokenizer adds by itself, and cut
    into consecutive blocks of `context` tokens. The last block may be shorter; if it is a single
    token it predicts nothing and is left out. Block b of n_b tokens predicts its last n_b - 1
    tokens, each from the tokens before it in the same block, at a mean loss of L_b nats. Then

        nats_per_token = sum_b(n_b * L_b) / sum_b(n_b)
        perplexity     = exp(nats_per_token)
        bits_per_byte  = sum_b((n_b - 1) * L_b) / ln 2 / bytes of the text in UTF-8

    This is the protocol of the EMP, Wanda and SparseGPT papers, whose blocks are all full; there
    the weights n_b cancel. It is not the word-level perplexity of lm-eval's task `wikitext`.

    Losses are computed in float32 from the logits in the model's own dtype, and summed in float64.
    The model runs where it lies, in evaluation mode; every module's mode is restored afterwards.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer; it is left as it is.
        text: what to predict.
        context: tokens in a block, at least 2 and at most the positions the model has.

    Returns:
        The perplexity, and what else the same losses say.

    Raises:
        OptionError: `context` is out of its range, or the text has fewer than two tokens.
    """
    _check_context(model, context)
    blocks = _blocks(tokenizer, text, context)
    with _evaluating(model):
        losses = [_block_nats(model, block) for block in blocks]
    sizes = [len(block) for block in blocks]
    tokens = sum(sizes)
    means = (nats / (n - 1) for nats, n in zip(losses, sizes, strict=True))
    nats_per_token = math.fsum(n * mean for mean, n in zip(means, sizes, strict=True)) / tokens
    return Perplexity(
        perplexity=_exp(nats_per_token),
        nats_per_token=nats_per_token,
        bits_per_byte=math.fsum(losses) / math.log(2) / len(text.encode()),
        tokens=tokens,
        context=context,
    )


def _check_context(model: PreTrainedModel, context: int) -> None:
    if context < 2:
        raise OptionError(
            f"context is {context}; a block that short predicts nothing: give 2 or more"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and context > positions:
        raise OptionError(
            f"context is {context}; this model has {positions} positions: give {positions} or less"
        )


def _blocks(tokenizer: PreTrainedTokenizerBase, text: str, context: int) -> list[list[int]]:
    # verbose=False: the whole text is longer than the model's positions, and is meant to be
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) < 2:
        raise OptionError(f"text is {len(ids)} tokens long; it takes two to predict one: give more")
    blocks = [ids[start : start + context] for start in range(0, len(ids), context)]
    return blocks if len(blocks[-1]) > 1 else blocks[:-1]


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; each module gets its own mode back."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    model.train(mode=False)
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _block_nats(model: PreTrainedModel, block: list[int]) -> float:
    """Total loss in nats of the n - 1 tokens that one block predicts."""
    import torch

    ids_1n = torch.tensor([block], device=model.device)
    logits_nV = model(input_ids=ids_1n, use_cache=False).logits[0]
    return _total_nats(logits_nV[:-1], ids_1n[0, 1:].to(logits_nV.device))


def _total_nats(logits_nV: torch.Tensor, targets_n: torch.Tensor) -> float:
    """Summed cross entropy; the logits are made float32 a slice of rows at a time."""
    from torch.nn.functional import cross_entropy

    rows = max(1, _SLICE_ELEMENTS // logits_nV.shape[1])
    total = 0.0
    for start in range(0, len(targets_n), rows):
        logits, targets = logits_nV[start : start + rows], targets_n[start : start + rows]
        losses = cross_entropy(logits.float(), targets, reduction="none")
        total += losses.double().sum().item()
    return total


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
