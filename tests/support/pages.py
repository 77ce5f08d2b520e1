"""A report's page taken apart, and a model whose figures are worked out another way."""

import json
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from support.checkpoints import Tensors, gaussian, llama_config, write_checkpoint

HIDDEN, INNER, BLOCKS = 32, 48, 3
LEAVES = ("down_proj", "gate_proj", "up_proj")


def name_of(block: int, leaf: str) -> str:
    """A tensor's name."""
    return f"model.layers.{block}.mlp.{leaf}.weight"


def three_blocks() -> Tensors:
    """MLPs whose N_eff / N differs from block to block; the last block's gate is heavy-tailed."""
    tensors = {"model.norm.weight": gaussian(HIDDEN)}
    for block in range(BLOCKS):
        for seed, leaf in enumerate(LEAVES, start=3 * block):
            shape = (HIDDEN, INNER) if leaf == "down_proj" else (INNER, HIDDEN)
            power = 3 if (block, leaf) == (2, "gate_proj") else 1
            tensors[name_of(block, leaf)] = gaussian(*shape, seed=seed) ** power
    return tensors


def write_three_blocks(folder: Path) -> Path:
    """A checkpoint of them."""
    return write_checkpoint(folder, llama_config(HIDDEN, INNER, layers=BLOCKS), three_blocks())


@dataclass
class Summed:
    """Figures of some tensors together, each row a group.

    Attributes:
        fractions: N_eff / N of every row.
        means: N_eff / N, the mean of each tensor weighted by its size.
    """

    weights: int = 0
    kept: int = 0
    mass: float = 0.0
    kept_mass: float = 0.0
    fractions: list[float] = field(default_factory=list)
    means: float = 0.0

    @property
    def figures(self) -> dict[str, float]:
        """By the names that the page has for them."""
        return {
            "n_eff_fraction_mean": self.means / self.weights,
            "sparsity": 1 - self.kept / self.weights,
            "retained_mass": self.kept_mass / self.mass,
        }


def summed(tensors: list[torch.Tensor], beta: float) -> Summed:
    """Work a few tensors out in plain float64: Σ, Σ², a sort and a sum, row by row."""
    total = Summed()
    for tensor in tensors:
        scores = tensor.double().abs()
        n_eff = scores.sum(1) ** 2 / (scores**2).sum(1)
        counts = (beta * n_eff * (1 + 1e-9)).floor().long().clamp(1, scores.shape[1]).tolist()
        order = scores.sort(dim=1, descending=True).values
        total.weights += scores.numel()
        total.kept += sum(counts)
        total.mass += scores.sum().item()
        total.kept_mass += sum(row[:k].sum().item() for row, k in zip(order, counts, strict=True))
        fractions = (n_eff / scores.shape[1]).tolist()
        total.fractions += fractions
        total.means += sum(fractions) / len(fractions) * scores.numel()
    return total


class Page(HTMLParser):
    """A page as a browser reads it.

    Attributes:
        tags: Every element with its attributes, in order.
        texts: The text of the title, the style and the scripts, by element or identifier.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {}
        self._inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") or tag

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002
        self._inside = ""

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def handle_data(self, data: str) -> None:
        self.texts[self._inside] = self.texts.get(self._inside, "") + data

    @property
    def content(self) -> dict[str, Any]:
        """The JSON in it."""
        return json.loads(self.texts["content"])
