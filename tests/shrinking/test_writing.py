"""A smaller checkpoint, written for a choice that is given."""

from pathlib import Path

import pytest
import torch
from support.mixtures import (
    GROUPED,
    MIXTURES,
    layers_with_experts,
    make_mixture,
    routed_among,
)
from support.shrinking import write_choice
from transformers import AutoModelForCausalLM

TOKENS = torch.tensor([[1, 5, 9, 13, 17, 21, 25, 29], [2, 6, 10, 14, 18, 22, 26, 30]])


def quick(architecture: str, dtype: torch.dtype) -> bool:
    """Whether a case is new: experts one by one, fused with biases, and in groups."""
    return dtype == torch.bfloat16 and architecture in ("mixtral", "gpt-oss", "deepseek-v3")


CASES = [
    pytest.param(
        architecture,
        dtype,
        marks=() if quick(architecture, dtype) else pytest.mark.slow,
        id=f"{architecture}-{dtype}".replace("torch.", ""),
    )
    for architecture in MIXTURES
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
]


@pytest.mark.parametrize(("architecture", "dtype"), CASES)
def test_the_smaller_model_computes_what_the_dense_one_does_without_those_experts(
    tmp_path: Path, architecture: str, dtype: torch.dtype
) -> None:
    dense = make_mixture(architecture, dtype)
    dense.save_pretrained(tmp_path / "dense", max_shard_size=4000)
    layers = layers_with_experts(dense)
    choices = [(0, 2, 3, 5), (1, 2, 4, 5)] if architecture in GROUPED else [(0, 2, 5), (1, 3, 4)]
    kept = dict(zip(layers, choices, strict=False))
    with torch.no_grad(), routed_among(dense, kept):
        expected = dense(TOKENS).logits

    by_holder = {f"model.layers.{layer}": stays for layer, stays in kept.items()}
    out = write_choice(tmp_path / "dense", tmp_path / "small", by_holder)

    small, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert small.dtype == dtype
    with torch.no_grad():
        found = small(TOKENS).logits
    assert torch.isfinite(expected).all()
    # these add up all experts, the outputs of those that go being zero: sums are rounded otherwise
    rounded = architecture in ("gpt-oss", "llama4")
    most = torch.finfo(dtype).eps * expected.abs().max().item() if rounded else 0
    torch.testing.assert_close(found, expected, rtol=0, atol=most)
