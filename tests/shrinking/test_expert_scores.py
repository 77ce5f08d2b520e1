"""Scores of all experts of checkpoints that hold them one by one or fused, against plain torch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import V
from support.calibrated import opened, save_text, save_tokenizer
from support.mixtures import EXPERTS, MIXTURES, make_mixture

from emp_llm.hub.source import find_source
from emp_llm.runtime.progress import SharedProgress, Silent
from emp_llm.shrinking.choice import Choice, Structures
from emp_llm.shrinking.expert_criterion_registry import find_expert_criterion
from emp_llm.shrinking.expert_scores import expert_scores, outputs_by_holder
from emp_llm.shrinking.plan import ShrinkPlan

QUICK = ("mixtral", "gpt-oss", "deepseek-v3")
CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MIXTURES]


def plan_of(folder: Path) -> ShrinkPlan:
    source = find_source(folder, progress=SharedProgress(Silent()))
    return ShrinkPlan.make(source, source.open_checkpoint(), ["experts"])


def aimer(model: Any, holder: str) -> list[float]:
    """The quotients that AIMER ranks the experts of a decoder block by, of a loaded model."""
    block = model.get_submodule(holder)
    (stacks,) = (
        [p for p in module.parameters() if p.ndim == 3]
        for name, module in block.named_modules()
        if name.rpartition(".")[2] == "experts"
    )
    quotients = []
    for expert in range(EXPERTS):
        all_N = torch.cat([stack[expert].flatten() for stack in stacks]).double()
        quotients.append((all_N.abs().mean() / all_N.square().mean().sqrt()).item())
    return quotients


@pytest.mark.parametrize("architecture", CASES)
def test_aimer_reads_the_matrices_of_each_expert_and_nothing_else(
    tmp_path: Path, architecture: str
) -> None:
    model = make_mixture(architecture, torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=4000)
    plan = plan_of(tmp_path)
    with plan.source.files(plan.checkpoint.shards) as files:
        scores = expert_scores(plan, find_expert_criterion("aimer"), files)
    assert scores.keys() == set(plan.structures["experts"].holders)
    for holder, found in scores.items():
        expected = [1 - quotient for quotient in aimer(model, holder)]
        assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("architecture", CASES)
def test_each_holder_gets_what_its_own_experts_give(tmp_path: Path, architecture: str) -> None:
    make_mixture(architecture, torch.float32).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model", V)
    text = save_text(tmp_path / "words.txt")
    plan = plan_of(tmp_path / "model")
    with opened(tmp_path / "model", text, tmp_path, "none") as session:
        outputs = outputs_by_holder(plan, session)
        tokens = session.samples.ids_NL.numel()
    holders = plan.structures["experts"].holders
    assert outputs.keys() == set(holders)
    assert len({id(sums) for sums in outputs.values()}) == len(holders)
    for sums in outputs.values():
        assert sums.tokens_E.sum() == (1 if architecture == "llama4" else 2) * tokens
        assert (sums.contributions_E > 0).equal(sums.tokens_E > 0)


def test_the_best_of_each_group_stay() -> None:
    structures = Structures(kind="experts", number=6, holders=("a", "b"), groups=2)
    scores = {"a": (1.0, 3.0, 2.0, 9.0, 8.0, 7.0), "b": (4.0, 4.0, 4.0, 0.0, 0.0, 1.0)}
    choice = Choice.best(structures, 4, "given", scores)
    assert choice.kept == {"a": (1, 2, 3, 4), "b": (0, 1, 3, 5)}
    assert choice.number == 4
    one_group = Structures(kind="experts", number=6, holders=("a", "b"))
    assert Choice.best(one_group, 3, "given", scores).kept == {"a": (3, 4, 5), "b": (0, 1, 2)}
