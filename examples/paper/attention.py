"""Attention of a small language model, where each query keeps N_eff of its keys."""

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean

import torch
from matplotlib.figure import Figure
from row import BLUE, GREEN, ORANGE, Line, Row, Run, curve, finish, run
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from emp_llm import keep_mask

DEMO = Path(__file__).parents[2] / "demo"
WINDOW = 256  # tokens
SPREAD = 9000  # tokens from the beginning of a passage to that of the next
BETAS = ("0.25", "0.5", "0.75", "1", "1.5", "2", "4")

Rule = Callable[[torch.Tensor], torch.Tensor]
"""From attention [batch, heads, queries, keys], whose rows sum to 1, to which of it stays."""


class SparseAttention:
    """Causal attention in which a rule drops keys; the weights of the others sum to 1 again."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.kept = self.total = 0

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        _mask: torch.Tensor | None,
        scaling: float,
        **_others: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As transformers calls it: [batch, heads, tokens, d] → [batch, tokens, heads, d]."""
        key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
        causal = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~causal, -torch.inf)
        weights = scores.softmax(-1)
        keep = self.rule(weights) & causal
        self.kept += int(keep.sum())
        self.total += int(causal.sum()) * weights.shape[0] * weights.shape[1]
        weights = weights * keep
        weights = weights / weights.sum(-1, keepdim=True)
        return (weights @ value).transpose(1, 2), weights


def top(weights: torch.Tensor, share: float) -> torch.Tensor:
    """As many keys for every query, those with the largest weights; the share is that of all."""
    order = weights.argsort(dim=-1, descending=True, stable=True)
    kept = torch.arange(weights.shape[-1]) < _counts(weights, share)[:, None]
    return torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order, kept.expand_as(order))


def window(weights: torch.Tensor, share: float) -> torch.Tensor:
    """As many keys for every query, the latest ones; the share is that of all."""
    ages = torch.arange(weights.shape[-2])[:, None] - torch.arange(weights.shape[-1])
    return (ages < _counts(weights, share)[:, None]).expand_as(weights)


def _counts(weights: torch.Tensor, share: float) -> torch.Tensor:
    """As many keys for every query, all it has for the first, one more for the last: [queries]."""
    keys = torch.arange(1, weights.shape[-2] + 1)
    total = round(share * int(keys.sum()))
    most = max(k for k in keys.tolist() if k == 1 or int(keys.clamp(max=k).sum()) <= total)
    counts = keys.clamp(max=most)
    counts[len(keys) - (total - int(counts.sum())) :] += 1
    return counts


def measure(passage: int, *, windows: int = 4) -> Run:
    """The perplexity of windows of a passage: with all keys, by EMP at each β, and by controls."""
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    text = (DEMO / "text.txt").read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    x = tokens[passage * SPREAD :][: windows * WINDOW].view(windows, WINDOW)

    def cost(rule: Rule) -> dict[str, float]:
        attention = SparseAttention(rule)
        AttentionInterface.register("sparse", attention)
        model.set_attn_implementation("sparse")
        with torch.inference_mode():
            loss = model(x, labels=x, use_cache=False).loss.item()
        return {"kept": 100 * attention.kept / attention.total, "perplexity": math.exp(loss)}

    dense = cost(lambda weights: weights >= 0)
    found: Run = {"dense": dense, "betas": {}}
    for beta in BETAS:
        ours = cost(partial(keep_mask, beta=float(beta)))
        share = ours["kept"] / 100
        costs = {"emp": ours}
        for name, control in (("top-k", top), ("window", window)):
            costs[name] = cost(partial(control, share=share))
        for figures in costs.values():
            figures["above"] = 100 * (figures["perplexity"] / dense["perplexity"] - 1)
        found["betas"][beta] = costs
    return found


def lines(runs: list[Run]) -> list[Line]:
    """EMP beside as many keys for every query: those with the largest weights, and the latest."""
    dense = [run["dense"]["perplexity"] for run in runs]
    found = []
    for beta, control in product(("0.25", "0.5", "1", "2"), ("top-k", "window")):
        costs = [run["betas"][beta] for run in runs]
        dropped = [100 - cost["emp"]["kept"] for cost in costs]
        ours, theirs = ([cost[by]["perplexity"] for cost in costs] for by in ("emp", control))
        what = f"perplexity, β = {beta}, beside {control}"
        found.append(Line(what, dropped, dense, ours, theirs, lower_is_better=True, decimals=2))
    return found


def draw(figure: Figure, runs: list[Run]) -> None:
    """Perplexity above that of full attention, over the share of keys that are kept."""
    axes = figure.subplots()
    styles = {
        "emp": (ORANGE, "EMP: β · N_eff of each row"),
        "top-k": (BLUE, "top-k: as many for every query"),
        "window": (GREEN, "window: the latest k"),
    }
    for name, (color, label) in styles.items():
        points = [[run["betas"][beta][name] for run in runs] for beta in BETAS]
        style = {"color": color, "marker": "o", "markersize": 4, "label": label}
        curve(axes, points, "kept", "above", **style)
    one = mean(run["betas"]["1"]["emp"]["kept"] for run in runs)
    axes.axvline(one, color="black", linewidth=0.8, label="EMP, β = 1")
    finish(axes, xlabel="keys kept, %", ylabel="perplexity above full attention, %")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")


TITLE = "Attention of a small language model (sparsity: keys that are dropped)"
ROW = Row("attention", TITLE, measure, lines, draw, size=(8, 3.6))

if __name__ == "__main__":
    run(ROW)
