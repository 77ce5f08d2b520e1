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
from transformers import AutoModelForCausalLM

from emp_llm.hub.source import find_source
from emp_llm.runtime.progress import SharedProgress, Silent
from emp_llm.runtime.workers import Workers
from emp_llm.shrinking.choice import Choice
from emp_llm.shrinking.plan import ShrinkPlan
from emp_llm.shrinking.writing import write_config_and_index, write_shards

TOKENS = torch.tensor([[1, 5, 9, 13, 17, 21, 25, 29], [2, 6, 10, 14, 18, 22, 26, 30]])


def shrink_by(source: Path, out: Path, kept: dict[int, tuple[int, ...]]) -> Path:
    """Write the smaller model in which each layer has these experts."""
    progress = SharedProgress(Silent())
    found = find_source(source, progress=progress)
    plan = ShrinkPlan.make(found, found.open_checkpoint(), ["experts"])
    holders = {holder: kept[int(holder.rpartition(".")[2])] for holder in
               plan.structures["experts"].holders}  # fmt: skip
    shrinkage = plan.with_choices([Choice(kind="experts", kept=holders)])
    out.mkdir()
    write_shards(shrinkage, Workers(threads=2, progress=progress), out)
    write_config_and_index(shrinkage, out)
    return out


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

    out = shrink_by(tmp_path / "dense", tmp_path / "small", kept)

    small, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert small.dtype == dtype
    with torch.no_grad():
        found = small(TOKENS).logits
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
