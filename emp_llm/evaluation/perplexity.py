"""How well a model predicts a text: the protocols behind the perplexities that papers print.

Shapes in names: n tokens of one block, V the size of the vocabulary.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from emp_llm.errors import OptionError
from emp_llm.runtime.progress import Silent
from emp_llm.texts.texts import Text
from emp_llm.texts.tokens import check_length, positions_of, tokenized

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from emp_llm.runtime.progress import Progress
from emp_llm.texts.texts import Protocol, check_protocol

__all__ = ["Perplexity", "evaluating", "perplexity"]


_SLICE_ELEMENTS = 1 << 24  # logits in float32 at a time: 64 MiB, whatever the vocabulary


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """What `perplexity` measured.

    Attributes:
        perplexity: exp(nats_per_token); inf where that overflows, NaN where a loss is NaN.
        nats_per_token: mean of the blocks' mean losses, each weighted by its number of tokens.
        bits_per_byte: bits spent on all predicted tokens, per byte in UTF-8 of the text that the
            scored blocks hold. Unlike the perplexity it can be compared between models of
            different tokenizers.
        tokens: tokens in the blocks that were scored.
        context: tokens in a full block.
        protocol: how the text was cut into blocks.
    """

    perplexity: float
    nats_per_token: float
    bits_per_byte: float
    tokens: int
    context: int
    protocol: Protocol


def perplexity(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Text,
    *,
    context: int = 2048,
    protocol: Protocol = "paper",
    progress: Progress | None = None,
) -> Perplexity:
    """Measures the perplexity of a causal language model on a text.

    The text is tokenized once, with the special tokens that the tokenizer adds by itself, and cut
    into consecutive blocks of `context` tokens. Block b of n_b tokens predicts its last n_b - 1
    tokens, each from the tokens before it in the same block, at a mean loss of L_b nats. Then

        nats_per_token = sum_b(n_b * L_b) / sum_b(n_b)
        perplexity     = exp(nats_per_token)
        bits_per_byte  = sum_b((n_b - 1) * L_b) / ln 2 / bytes of the blocks' text in UTF-8

    The protocols differ in the tokens behind the last full block. ``paper``, that of the authors
    of EMP, scores them as a shorter block, unless it is a single token, which predicts nothing.
    ``gptq``, that of GPTQ, SparseGPT and Wanda, leaves them out, so that all n_b are equal. Neither
    is the word-level perplexity of lm-eval's task ``wikitext``.

    Losses are computed in float32 from the logits in the model's own dtype, and summed in float64.
    The model runs where it lies, in evaluation mode; every module's mode is restored afterwards.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer; it is left as it is.
        text: what to predict; a `Text` may say how many blocks of it are scored at most.
        context: tokens in a block, at least 2 and at most the positions the model has.
        protocol: ``paper`` or ``gptq``.
        progress: told of the tokens that are done.

    Returns:
        The perplexity, and what else the same losses say.

    Raises:
        OptionError: `context` or `protocol` is none that can be, the text is too short to be
            scored, or the tokenizer gives tokens that the model does not have.
    """
    check_protocol(protocol)
    check_length("context", context, positions_of(model.config))
    progress = progress or Silent()
    if isinstance(text, str):
        text = Text("text", text)
    ids, ends = _tokenize(model, tokenizer, text)
    blocks = _blocks(text, ids, context, protocol)
    sizes = [len(block) for block in blocks]
    tokens = sum(sizes)
    progress.begin(f"perplexity of {text.name}", tokens, "tokens")
    losses = []
    with evaluating(model):
        for block in blocks:
            losses.append(_block_nats(model, block))
            progress.advance(len(block))
    means = (nats / (n - 1) for nats, n in zip(losses, sizes, strict=True))
    nats_per_token = math.fsum(n * mean for mean, n in zip(means, sizes, strict=True)) / tokens
    nbytes = len(text.text[: ends[tokens - 1]].encode())
    return Perplexity(
        perplexity=_exp(nats_per_token),
        nats_per_token=nats_per_token,
        bits_per_byte=math.fsum(losses) / math.log(2) / nbytes,
        tokens=tokens,
        context=context,
        protocol=protocol,
    )


def _tokenize(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Text
) -> tuple[list[int], list[int]]:
    """The text's tokens, and for each the index behind the last character that it stands for."""
    fast = tokenizer.is_fast
    weight: torch.Tensor = model.get_input_embeddings().get_parameter("weight")
    encoded = tokenized(tokenizer, text, weight.shape[0], offsets=fast)
    ids: list[int] = encoded["input_ids"]
    if fast:
        # special tokens stand for no characters
        ends = list(accumulate((end for _, end in encoded["offset_mapping"]), max))
    else:
        ends = [len(text.text) * (i + 1) // len(ids) for i in range(len(ids))]
    return ids, ends


def _blocks(text: Text, ids: list[int], context: int, protocol: Protocol) -> list[list[int]]:
    if len(ids) < 2:
        raise OptionError(
            f"{text.name} is {len(ids)} tokens long; it takes two to predict one: give more"
        )
    if protocol == "gptq" and len(ids) < context:
        raise OptionError(
            f"{text.name} is {len(ids)} tokens long, shorter than one block of {context}: give a "
            "longer text, a smaller context or the protocol 'paper'"
        )
    blocks = [ids[start : start + context] for start in range(0, len(ids), context)]
    fewest = context if protocol == "gptq" else 2
    return (blocks if len(blocks[-1]) >= fewest else blocks[:-1])[: text.blocks]


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
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

    # where weights are offloaded, accelerate moves what comes in
    device = "cpu" if model.device.type == "meta" else model.device
    ids_1n = torch.tensor([block], device=device)
    logits_nV = model(input_ids=ids_1n, use_cache=False).logits[0]
    return _total_nats(logits_nV[:-1], ids_1n[0, 1:].to(logits_nV.device))


def _total_nats(logits_nV: torch.Tensor, targets_n: torch.Tensor) -> float:
    """Summed cross entropy; the logits are made float32 a slice of rows at a time."""
    import torch
    from torch.nn.functional import cross_entropy

    rows = max(1, _SLICE_ELEMENTS // logits_nV.shape[1])
    total = torch.zeros((), dtype=torch.float64, device=logits_nV.device)
    for start in range(0, len(targets_n), rows):
        logits, targets = logits_nV[start : start + rows], targets_n[start : start + rows]
        total += cross_entropy(logits.float(), targets, reduction="none").double().sum()
    return total.item()


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
