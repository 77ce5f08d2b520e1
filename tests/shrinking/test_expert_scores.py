"""What experts give on data, by what holds them in the checkpoint."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.architectures import F, H, V
from support.calibrated import calibration, opened, save_text, save_tokenizer
from support.mixtures import EXPERTS, MIXTURES, make_mixture
from support.shrinking import found_plan, workers

from emp_llm import ExpertCriterion
from emp_llm.shrinking.choosing import measuring_in
from emp_llm.shrinking.expert_criteria import BlockExperts
from emp_llm.shrinking.expert_scores import ExpertScores
from emp_llm.shrinking.routed_walk import outputs_by_holder

SIX = (0, 1, 2, 3, 4, 5)
QUICK = ("mixtral", "gpt-oss", "deepseek-v3")
CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MIXTURES]


@pytest.mark.parametrize("architecture", CASES)
def test_each_holder_gets_what_its_own_experts_give(tmp_path: Path, architecture: str) -> None:
    make_mixture(architecture, torch.float32).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model", V)
    text = save_text(tmp_path / "words.txt")
    plan = found_plan(tmp_path / "model")
    with opened(tmp_path / "model", text, tmp_path, "none") as session:
        outputs = outputs_by_holder(plan, session)
        tokens = session.samples.ids_NL.numel()
    holders = plan.structures["experts"].holders
    assert outputs.keys() == set(holders)
    assert len({id(sums) for sums in outputs.values()}) == len(holders)
    for sums in outputs.values():
        assert sums.tokens_E.sum() == (1 if architecture == "llama4" else 2) * tokens
        assert np.array_equal(sums.contributions_E > 0, sums.tokens_E > 0)


class Recording(ExpertCriterion):
    """Keeps what it is given, and counts how often it is asked."""

    def __init__(self) -> None:
        self.given: list[BlockExperts] = []

    def scores(self, experts: BlockExperts) -> npt.ArrayLike:
        self.given.append(experts)
        return range(experts.number)


class Both(Recording):
    needs = frozenset({"weights", "outputs"})


def test_a_criterion_is_given_what_it_needs_and_no_more(tmp_path: Path) -> None:
    make_mixture("mixtral", torch.bfloat16).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model", V)
    data = calibration(save_text(tmp_path / "words.txt"))
    plan = found_plan(tmp_path / "model")
    both, neither = Both(), Recording()
    with measuring_in(tmp_path / "scratch", plan, data, workers()) as measuring:
        scores = ExpertScores(plan, workers(), measuring)
        assert scores.by(neither, 7) == dict.fromkeys(plan.structures["experts"].holders, SIX)
        scores.by(both, 8)

    assert [(one.weights, one.outputs, one.seed) for one in neither.given] == [(None, None, 7)] * 2
    first, second = both.given
    assert (first.block, second.block, first.seed) == ("model.layers.0", "model.layers.1", 8)
    for given in both.given:
        assert given.weights is not None
        assert given.weights.numbers_E.tolist() == [3 * H * F] * EXPERTS
        assert given.outputs is not None
        assert given.outputs.tokens_E.sum() == 2 * data.samples * (data.length or 0)
