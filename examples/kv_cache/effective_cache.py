"""A KV cache that keeps, of each head, as many entries as its effective number says.

    from effective_cache import ATTENTION, EffectiveCache

    model = AutoModelForCausalLM.from_pretrained(NAME, attn_implementation=ATTENTION)
    cache = EffectiveCache(model.config, ByEffectiveNumber(beta=4))
    model.generate(**tokens, past_key_values=cache)

Every entry has a mass: the attention that it has got so far, from all queries of the query heads
that read it. After each forward pass a rule chooses which entries stay, by the masses:

    ByEffectiveNumber   ⌊β · N_eff⌋ of a head, N_eff = (Σ m)² / Σ m², and the most recent ones
    ByBudget            as many of each head: half of them recent (H2O, arXiv 2306.14048)
    ByWindow            the most recent ones, and the first few (StreamingLLM, arXiv 2309.17453)

Keys have their positions' rotation in them when they are cached, so entries can go without the
others changing. transformers makes the mask for all positions that were seen; the attention
function takes the columns of those that are left, so padding and causality hold for every head. A
layer has as many places for each head as the one with the most entries needs; the places that are
left over are marked, and no query sees them.

Axes: B sequences, H heads of keys, G query heads for each, Q queries, L entries, T positions seen.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Final

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import eager_mask

__all__ = [
    "ATTENTION",
    "ByBudget",
    "ByEffectiveNumber",
    "ByWindow",
    "EffectiveCache",
    "EffectiveLayer",
    "Rule",
]

ATTENTION: Final = "emp_effective"
"""The name of the attention function, for ``attn_implementation``."""

EMPTY: Final = -1
"""The position of a place that holds no entry."""


class Rule(ABC):
    """Which entries of a cache stay."""

    @abstractmethod
    def keep(self, mass_BHL: torch.Tensor, position_BHL: torch.Tensor, seen: int) -> torch.Tensor:
        """Choose entries.

        Args:
            mass_BHL: float32, the attention that each has got.
            position_BHL: int64, its position; `EMPTY` where there is none.
            seen: How many positions were seen.

        Returns:
            bool [B, H, L]; False for places that are empty.
        """


@dataclass(frozen=True)
class ByEffectiveNumber(Rule):
    """⌊β · N_eff⌋ entries of each head, at least one, and the `recent` last ones."""

    beta: float = 1.0
    recent: int = 32

    def keep(self, mass_BHL: torch.Tensor, position_BHL: torch.Tensor, seen: int) -> torch.Tensor:
        """The entries with the largest masses, and the recent ones."""
        held = position_BHL != EMPTY
        squares = (mass_BHL * mass_BHL).sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        effective = mass_BHL.sum(-1) ** 2 / squares
        count_BH1 = (self.beta * effective).floor().clamp(min=1)[..., None]
        return held & (_rank(mass_BHL, held) < count_BH1) | (position_BHL >= seen - self.recent)


@dataclass(frozen=True)
class ByBudget(Rule):
    """`count` entries of each head: half of them the last ones, the others by their masses."""

    count: int

    def keep(self, mass_BHL: torch.Tensor, position_BHL: torch.Tensor, seen: int) -> torch.Tensor:
        """The recent entries, and of the others those with the largest masses."""
        recent = self.count // 2
        older = (position_BHL != EMPTY) & (position_BHL < seen - recent)
        heavy = older & (_rank(mass_BHL, older) < self.count - recent)
        return heavy | (position_BHL >= seen - recent)


@dataclass(frozen=True)
class ByWindow(Rule):
    """`count` entries of each head: the `first` ones, and the last ones."""

    count: int
    first: int = 4

    def keep(self, _mass_BHL: torch.Tensor, position_BHL: torch.Tensor, seen: int) -> torch.Tensor:
        """The first and the last entries."""
        held = position_BHL != EMPTY
        return held & (position_BHL < self.first) | (
            position_BHL >= seen - (self.count - self.first)
        )


def _rank(mass_BHL: torch.Tensor, among_BHL: torch.Tensor) -> torch.Tensor:
    """The place of each entry among some of them, the largest mass first; the others come last."""
    order = mass_BHL.masked_fill(~among_BHL, -1).argsort(dim=-1, descending=True, stable=True)
    return order.argsort(dim=-1)


class EffectiveLayer(DynamicLayer):
    """The entries of one layer.

    Args:
        rule: Which of them stay.

    Attributes:
        keys: [B, H, L, D].
        values: [B, H, L, D].
        positions: int64 [B, H, L]; `EMPTY` where there is no entry.
        mass: float32 [B, H, L].
        seen: How many positions were seen.
    """

    is_croppable = False

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.seen = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Begin with no entry."""
        super().lazy_initialization(key_states, value_states)
        none = (*key_states.shape[:2], 0)
        self.positions = torch.empty(none, dtype=torch.int64, device=key_states.device)
        self.mass = torch.empty(none, dtype=torch.float32, device=key_states.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add entries; the attention function finds the layer by the keys that are returned."""
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        batch, heads, new = key_states.shape[:3]
        positions = torch.arange(self.seen, self.seen + new, device=keys.device)
        added = positions.expand(batch, heads, new)
        self.positions = torch.cat([self.positions, added], -1)
        self.mass = torch.cat([self.mass, added.new_zeros(added.shape, dtype=torch.float32)], -1)
        self.seen += new
        keys.effective_layer = weakref.ref(self)  # type: ignore[attr-defined]
        return keys, values

    def observe(self, attention_BHL: torch.Tensor) -> None:
        """Add the attention that entries have got, and drop those that do not stay."""
        self.mass = self.mass + attention_BHL
        keep = self.rule.keep(self.mass, self.positions, self.seen)
        if bool(keep.all()):
            return
        places = keep.sum(-1)
        longest = int(places.max())
        # the entries that stay, in the order of their positions
        at = (~keep).to(torch.int8).argsort(dim=-1, stable=True)[..., :longest]
        empty = torch.arange(longest, device=at.device) >= places[..., None]
        wide = at[..., None].expand(-1, -1, -1, self.keys.shape[-1])
        self.keys, self.values = self.keys.gather(2, wide), self.values.gather(2, wide)
        self.positions = self.positions.gather(2, at).masked_fill(empty, EMPTY)
        self.mass = self.mass.gather(2, at).masked_fill(empty, 0)

    @property
    def entries(self) -> int:
        """How many entries all heads of the batch hold."""
        return int((self.positions != EMPTY).sum())

    def get_seq_length(self) -> int:
        """How many positions were seen: the next token's position."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The mask is made for all positions; see `attend`."""
        return self.seen + query_length, 0

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the batch, for beam search."""
        super().reorder_cache(beam_idx)
        self.positions, self.mass = self.positions[beam_idx], self.mass[beam_idx]


class EffectiveCache(Cache):
    """A cache of `EffectiveLayer` for each of a model's layers; the model needs `ATTENTION`.

    Args:
        config: The model's configuration.
        rule: Which entries stay.

    Raises:
        ValueError: If the model is built with another attention function.
    """

    def __init__(self, config: PreTrainedConfig, rule: Rule) -> None:
        text = config.get_text_config(decoder=True)
        if text._attn_implementation != ATTENTION:
            raise ValueError(
                f"the model's attention is {text._attn_implementation!r}, which does not tell how "
                f"much each entry gets: load it with attn_implementation={ATTENTION!r}"
            )
        super().__init__(layers=[EffectiveLayer(rule) for _ in range(text.num_hidden_layers)])

    @property
    def entries(self) -> int:
        """How many entries all layers hold."""
        return sum(layer.entries for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes of their keys and values, without the places that hold none."""
        layer = self.layers[0]
        return 2 * self.entries * layer.keys.shape[-1] * layer.keys.element_size()


def attend(
    _module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: object,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention that tells the cache what each entry gets.

    Args:
        query: [B, H · G, Q, D].
        key: [B, H, L, D], from `EffectiveLayer.update`, or from no cache.
        value: [B, H, L, D].
        attention_mask: What is added to the scores, [B or 1, 1, Q, T].
        scaling: What scores are multiplied by.
        dropout: The share of attention that is dropped.

    Returns:
        The outputs, [B, Q, H · G, D], and no weights.
    """
    batch, heads = key.shape[:2]
    groups = query.unflatten(1, (heads, -1))
    scores = torch.einsum("bhgqd,bhld->bhgql", groups, key) * scaling
    layer: EffectiveLayer | None = getattr(key, "effective_layer", lambda: None)()
    if attention_mask is not None:
        mask = attention_mask.expand(batch, -1, -1, -1)
        if layer is not None:
            at = layer.positions.clamp(min=0)[:, :, None].expand(-1, -1, mask.shape[2], -1)
            mask = mask.expand(-1, heads, -1, -1).gather(3, at)
        scores = scores + mask[:, :, None]
    if layer is not None:
        nothing = (layer.positions == EMPTY)[:, :, None, None]
        scores = scores.masked_fill(nothing, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.float32)
    if layer is not None:
        layer.observe(weights.sum((2, 3)).detach())
    weights = torch.nn.functional.dropout(weights.to(value.dtype), dropout)
    out = torch.einsum("bhgql,bhld->bqhgd", weights, value)
    return out.flatten(2, 3), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, eager_mask)
