"""Perplexity of a model on a text, by the protocols that published results use.

Shapes in names: n tokens of one window, V the size of the vocabulary.
"""

from __future__ import annotations

import math
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from emp_llm.errors import OptionError
from emp_llm.runtime.progress import Silent
from emp_llm.texts.texts import Protocol, Text, check_protocol
from emp_llm.texts.tokens import check_length, positions_of, tokenized

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from emp_llm.runtime.progress import Progress

__all__ = ["Perplexity", "evaluating", "perplexity"]


_SLICE_ELEMENTS = 1 << 24  # logits in float32 at a time: 64 MiB, whatever the vocabulary


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """What `perplexity` measured.

    Attributes:
        perplexity: exp(nats_per_token); inf where that overflows, NaN where a loss is NaN.
        nats_per_token: Mean of the windows' mean losses, each weighted by its number of tokens.
        bits_per_byte: Bits spent on all predicted tokens, per byte in UTF-8 of the text in the
            scored windows. Unlike perplexities, it can be compared between models with different
            tokenizers.
        tokens: Tokens in the windows that were scored.
        context: Tokens in a full window.
        protocol: How the text was cut into windows.
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
    """Measure the perplexity of a causal language model on a text.

    The text is tokenized once, with the special tokens that the tokenizer adds by itself, and cut
    into consecutive windows of `context` tokens. In window w of n_w tokens, the last n_w - 1 tokens
    are predicted, each from the tokens before it in the same window, at a mean loss of L_w nats:

        nats_per_token = sum_w(n_w * L_w) / sum_w(n_w)
        perplexity     = exp(nats_per_token)
        bits_per_byte  = sum_w((n_w - 1) * L_w) / ln 2 / bytes of the windows' text in UTF-8

    The protocols differ in the tokens after the last full window. ``paper``, that of the authors of
    EMP, scores them as a shorter window, unless there is a single one, which predicts nothing.
    ``gptq``, that of GPTQ, SparseGPT and Wanda, leaves them out, so that all n_w are equal. Neither
    is the word-level perplexity of lm-eval's task ``wikitext``.

    Losses are computed in float32 from the logits in the model's own dtype, and summed in float64.
    The model runs on the device it is on, in evaluation mode; afterwards every module is in the
    mode that it was in.

    Args:
        model: A causal language model of transformers.
        tokenizer: Its tokenizer; it is not changed.
        text: What to predict; a `Text` can limit how many windows of it are scored.
        context: Tokens in a window, at least 2 and at most the positions the model has.
        protocol: ``paper`` or ``gptq``.
        progress: Reports the tokens that are done.

    Returns:
        The perplexity, and what else follows from the same losses.

    Raises:
        OptionError: If `context` or `protocol` is out of its range, the text is too short, or the
            tokenizer produces tokens that the model does not have.
    """
    check_protocol(protocol)
    check_length("context", context, positions_of(model.config))
    progress = progress or Silent()
    if isinstance(text, str):
        text = Text("text", text)
    ids, ends = _tokenize(model, tokenizer, text)
    windows = _windows(text, ids, context, protocol)
    sizes = [len(window) for window in windows]
    tokens = sum(sizes)
    progress.begin(f"perplexity of {text.name}", tokens, "tokens")
    losses = []
    with evaluating(model):
        for window in windows:
            losses.append(_window_nats(model, window))
            progress.advance(len(window))
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
    """The text's tokens, and for each the end of the text up to and with it, in characters."""
    fast = tokenizer.is_fast
    weight: torch.Tensor = model.get_input_embeddings().get_parameter("weight")
    encoded = tokenized(tokenizer, text, weight.shape[0], offsets=fast)
    ids: list[int] = encoded["input_ids"]
    if fast:
        # special tokens have no characters: their offsets are (0, 0), hence the running maximum
        ends = list(accumulate((end for _, end in encoded["offset_mapping"]), max))
    else:  # no offsets are known: as if all tokens were equally long
        ends = [len(text.text) * (i + 1) // len(ids) for i in range(len(ids))]
    return ids, ends


def _windows(text: Text, ids: list[int], context: int, protocol: Protocol) -> list[list[int]]:
    if len(ids) < 2:
        raise OptionError(
            f"{text.name} is {len(ids)} tokens long; perplexity needs 2: give a longer text"
        )
    if protocol == "gptq" and len(ids) < context:
        raise OptionError(
            f"{text.name} is {len(ids)} tokens long, shorter than one window of {context}: give a "
            "longer text, a smaller context or the protocol 'paper'"
        )
    windows = [ids[start : start + context] for start in range(0, len(ids), context)]
    fewest = context if protocol == "gptq" else 2
    return (windows if len(windows[-1]) >= fewest else windows[:-1])[: text.windows]


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module is in the mode it was in."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    model.train(mode=False)
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _window_nats(model: PreTrainedModel, window: list[int]) -> float:
    """Total loss in nats of the n - 1 tokens that are predicted in one window."""
    import torch

    # of a model with offloaded weights; accelerate moves the inputs to where it runs
    device = "cpu" if model.device.type == "meta" else model.device
    ids_1n = torch.tensor([window], device=device)
    logits_nV = model(input_ids=ids_1n, use_cache=False).logits[0]
    return _total_nats(logits_nV[:-1], ids_1n[0, 1:].to(logits_nV.device))


def _total_nats(logits_nV: torch.Tensor, targets_n: torch.Tensor) -> float:
    """Summed cross entropy; the logits are cast to float32 a slice of rows at a time."""
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
