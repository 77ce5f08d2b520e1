"""The cache that drops entries computes what attention to the entries that are left computes."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from effective_cache import (
    ATTENTION,
    EMPTY,
    ByBudget,
    ByEffectiveNumber,
    ByWindow,
    EffectiveCache,
    EffectiveLayer,
    Rule,
    attend,
)
from transformers import AutoModelForCausalLM

TinyModel = Callable[..., Path]

B, H, G, D, SCALE = 2, 3, 2, 4, 0.7


def kept(rule: Rule, mass: list[float], *, seen: int | None = None) -> list[int]:
    """The places that a rule keeps of one head."""
    positions = torch.arange(len(mass))[None, None]
    found = rule.keep(torch.tensor([[mass]]), positions, seen or len(mass))
    return found[0, 0].nonzero().flatten().tolist()


def test_the_effective_number_of_entries_is_kept_and_the_recent_ones() -> None:
    # (4 + 1 + 1 + 1 + 1)² / (16 + 4) = 3.2
    mass = [1.0, 4, 0, 1, 1, 1, 0, 0]
    assert kept(ByEffectiveNumber(1.0, recent=0), mass) == [0, 1, 3]
    assert kept(ByEffectiveNumber(0.3, recent=0), mass) == [1]
    assert kept(ByEffectiveNumber(0.7, recent=2), mass) == [0, 1, 6, 7]
    assert kept(ByEffectiveNumber(9.0, recent=0), mass) == list(range(8))


def test_a_budget_is_half_of_recent_entries_and_half_of_heavy_ones() -> None:
    mass = [1.0, 4, 0, 3, 1, 9, 0, 9]
    assert kept(ByBudget(4), mass) == [1, 5, 6, 7]
    assert kept(ByBudget(100), mass) == list(range(8))


def test_a_window_is_the_first_entries_and_the_last_ones() -> None:
    assert kept(ByWindow(5, first=2), [0.0] * 8) == [0, 1, 5, 6, 7]
    assert kept(ByWindow(3, first=0), [0.0] * 8) == [5, 6, 7]


def plain(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: list[list[list[int]]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last queries to some positions of each head, one query after the other.

    Returns:
        Outputs [B, Q, H · G, D], and what each position got, [B, H, T].
    """
    new, seen = queries.shape[2], keys.shape[2]
    out, got = torch.zeros(B, new, H * G, D), torch.zeros(B, H, seen)
    for b in range(B):
        for h in range(H):
            for g in range(G):
                for q in range(new):
                    at = [p for p in positions[b][h] if p <= seen - new + q]
                    scores = queries[b, h * G + g, q] @ keys[b, h, at].T * SCALE
                    weights = scores.softmax(-1)
                    out[b, q, h * G + g] = weights @ values[b, h, at]
                    got[b, h, at] += weights
    return out, got


@pytest.mark.parametrize("rule", [ByEffectiveNumber(0.5, recent=2), ByBudget(5), ByWindow(5, 1)])
def test_attention_is_to_the_entries_that_are_left(rule: Rule) -> None:
    generator = torch.Generator().manual_seed(0)
    steps = [5, 1, 3, 1, 1, 2]
    total = sum(steps)
    keys, values = (3 * torch.randn(B, H, total, D, generator=generator) for _ in range(2))
    layer = EffectiveLayer(rule)
    left = [[list[int]() for _ in range(H)] for _ in range(B)]
    mass = torch.zeros(B, H, total)
    seen, dropped = 0, 0
    for new in steps:
        queries = torch.randn(B, H * G, new, D, generator=generator)
        fresh = slice(seen, seen + new)
        seen += new
        hidden = torch.finfo(torch.float32).min
        causal = torch.full((new, seen), hidden).triu(seen - new + 1)[None, None]
        now = layer.update(keys[:, :, fresh], values[:, :, fresh])
        out, _ = attend(torch.nn.Identity(), queries, *now, causal, SCALE)
        for b in range(B):
            for h in range(H):
                left[b][h] += range(fresh.start, seen)
        expected, got = plain(queries, keys[:, :, :seen], values[:, :, :seen], left)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        mass[:, :, :seen] += got
        for b in range(B):
            for h in range(H):
                at = torch.tensor(left[b][h])
                stays = rule.keep(mass[b, h, at][None, None], at[None, None], seen)[0, 0]
                dropped += int((~stays).sum())
                left[b][h] = at[stays].tolist()
                found = layer.positions[b, h]
                assert found[found != EMPTY].tolist() == left[b][h]
    assert dropped > 0
    assert layer.entries == sum(len(places) for heads in left for places in heads)


def load(folder: Path, attention: str) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation=attention, dtype=torch.float32
    )


def test_a_cache_that_drops_nothing_gives_what_all_attention_gives_with_padding(
    tiny_model: TinyModel,
) -> None:
    eager, model = (load(tiny_model("llama"), name) for name in ("eager", ATTENTION))
    tokens = torch.randint(0, 30, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = EffectiveCache(model.config, ByBudget(1000))
    found = []
    with torch.no_grad():
        expected = eager(tokens, attention_mask=mask, position_ids=positions).logits
        for start in range(0, 12, 4):
            part = slice(start, start + 4)
            given = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
            found.append(model(tokens[:, part], past_key_values=cache, **given).logits)
    is_token = mask.bool()
    torch.testing.assert_close(torch.cat(found, 1)[is_token], expected[is_token])
    heads = model.config.num_hidden_layers * model.config.num_key_value_heads
    assert cache.entries == 2 * 12 * heads
    assert cache.nbytes == cache.entries * 2 * model.config.head_dim * 4


@pytest.mark.parametrize("beams", [1, 3])
def test_texts_are_generated_as_without_it_where_nothing_is_dropped(
    tiny_model: TinyModel, beams: int
) -> None:
    eager, model = (load(tiny_model("llama"), name) for name in ("eager", ATTENTION))
    tokens = torch.arange(1, 9)[None]
    given = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    cache = EffectiveCache(model.config, ByBudget(1000))
    found = model.generate(tokens, past_key_values=cache, **given)
    assert torch.equal(found, eager.generate(tokens, **given))
    small = EffectiveCache(model.config, ByWindow(4, 1))
    model.generate(tokens, past_key_values=small, **given)
    heads = model.config.num_hidden_layers * model.config.num_key_value_heads
    assert small.entries == 4 * beams * heads


def test_a_model_with_another_attention_function_is_refused(tiny_model: TinyModel) -> None:
    model = load(tiny_model("llama"), "eager")
    with pytest.raises(ValueError, match=ATTENTION):
        EffectiveCache(model.config, ByBudget(8))
