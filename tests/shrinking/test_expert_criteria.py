"""Scores of experts against their published formulas, and how a criterion is found."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from emp_llm import OptionError, effective_number
from emp_llm.shrinking.expert_criteria import (
    BlockExperts,
    ExpertCriterion,
    WeightSums,
    score_experts,
)
from emp_llm.shrinking.expert_criterion_registry import (
    find_expert_criterion,
    register_expert_criterion,
)
from emp_llm.shrinking.routed_outputs import RoutedOutputs

E, H, INNER = 3, 6, 5


def weights() -> list[torch.Tensor]:
    """All weights of each expert: Gaussian, uniform, and with few large ones."""
    generator = torch.Generator().manual_seed(2)
    size = 3 * INNER * H
    uniform = torch.rand(size, generator=generator) * 7
    gaussian, other = (torch.randn(size, generator=generator) for _ in range(2))
    return [gaussian.double(), uniform.double(), other.double() ** 3]


def experts(outputs: RoutedOutputs | None = None, **options: Any) -> BlockExperts:
    of_all = [weight.numpy() for weight in weights()]
    sums = WeightSums(
        numbers_E=np.array([weight.size for weight in of_all], "f8"),
        magnitudes_E=np.array([np.abs(weight).sum() for weight in of_all]),
        squares_E=np.array([np.square(weight).sum() for weight in of_all]),
    )
    asked = {"block": "layers.0", "number": E, "weights": sums, "outputs": outputs, **options}
    return BlockExperts(**asked)


def scores_of(name: str, given: BlockExperts) -> tuple[float, ...]:
    return score_experts(find_expert_criterion(name), given)


def test_aimer_is_mean_by_rms_and_the_lowest_stay() -> None:
    expected = []
    for weight_N in weights():
        quotient = (weight_N.abs().mean() / weight_N.square().mean().sqrt()).item()
        share = effective_number(weight_N.abs()) / weight_N.numel()
        assert quotient == pytest.approx(math.sqrt(share))
        expected.append(quotient)
    found = scores_of("aimer", experts())
    assert found == pytest.approx(expected, rel=1e-12)
    assert found.index(min(found)) == 2  # the one with few large weights
    assert find_expert_criterion("aimer").prefers == "low"


def test_an_expert_of_zeros_is_the_first_to_go_by_aimer_and_by_norm() -> None:
    sums = WeightSums(
        numbers_E=np.full(E, 4.0),
        magnitudes_E=np.array([0.0, 2.0, 4.0]),
        squares_E=np.array([0.0, 4.0, 4.0]),
    )
    assert scores_of("aimer", experts(weights=sums)) == (1, 0.5, 1)
    assert scores_of("norm", experts(weights=sums)) == (0, 2, 2)


def test_the_norm_is_that_of_all_weights() -> None:
    expected = [weight_N.norm().item() for weight_N in weights()]
    assert scores_of("norm", experts()) == pytest.approx(expected, rel=1e-12)


def test_reap_is_the_mean_of_gate_times_norm_over_routed_tokens() -> None:
    sums = RoutedOutputs(E)
    # expert 0 is sent two tokens, expert 1 none, expert 2 one; norms are 5, 13 and 10
    chosen, gates = torch.tensor([0, 2, 0]), torch.tensor([0.5, 0.25, 1.0])
    sums.add(chosen, gates, torch.tensor([[3.0, 4.0], [6.0, 8.0], [5.0, 12.0]]))
    assert scores_of("reap", experts(sums)) == ((0.5 * 5 + 13) / 2, 0, 0.25 * 10)


def test_random_scores_depend_on_the_seed_and_the_block_alone() -> None:
    first = scores_of("random", experts(seed=4))
    assert scores_of("random", experts(seed=4, weights=None)) == first
    others = (experts(seed=5), experts(seed=4, block="layers.1"))
    assert all(scores_of("random", other) != first for other in others)
    assert all(0 <= score < 1 for score in first)


class Frequency(ExpertCriterion):
    """Of a user: how many tokens."""

    needs = frozenset({"outputs"})

    def scores(self, experts: BlockExperts) -> npt.ArrayLike:
        assert experts.outputs is not None
        return experts.outputs.tokens_E


def test_a_criterion_of_ones_own_is_found_however_it_is_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    registry = "emp_llm.shrinking.expert_criterion_registry._criteria._registered"
    monkeypatch.setattr(registry, {})
    (tmp_path / "my_experts_here.py").write_text(
        "from emp_llm import ExpertCriterion\n"
        "class Last(ExpertCriterion):\n"
        "    def scores(self, experts):\n"
        "        return range(experts.number)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])

    assert scores_of("my_experts_here:Last", experts()) == (0, 1, 2)
    assert find_expert_criterion("my_experts_here:Last").name == "my_experts_here:Last"
    assert register_expert_criterion(Frequency) is Frequency
    sums = RoutedOutputs(E)
    sums.add(torch.tensor([1, 1, 2]), torch.ones(3), torch.ones(3, H))
    assert scores_of(Frequency.name, experts(sums)) == (0, 2, 1)
    sys.modules.pop("my_experts_here")


def refusal(criterion: Any) -> str:
    with pytest.raises(OptionError) as caught:
        find_expert_criterion(criterion)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_criterion_is_one_line() -> None:
    class Empty(ExpertCriterion):
        pass

    class Needy(Frequency):
        needs = frozenset({"norms"})  # type: ignore[arg-type]

    assert refusal("reep") == (
        "score is 'reep'; choose one of aimer, reap, norm, random, or give your own as module:Class"
    )
    assert "has no method scores(experts): define it" in refusal(Empty)
    assert "needs norms; calibration gathers weights, outputs" in refusal(Needy)
    assert "is a class, not a subclass of emp_llm.ExpertCriterion" in refusal(dict)


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        ("high", "scores\\(\\) fails with ValueError"),
        ([1.0, 2.0], r"scores are \[2\]; return \[3\], a number for each expert"),
        (torch.tensor([1.0, math.inf, 0]), r"scores are from 0\.0 to inf; return finite ones"),
        (torch.tensor([1.0, -1, 0]), r"scores are from -1\.0 to 1\.0; return finite ones"),
    ],
)
def test_scores_that_cannot_be_ranked_are_refused(scores: Any, reason: str) -> None:
    class Given(Frequency):
        name = "given"

        def scores(self, _: BlockExperts) -> Any:
            return scores

    with pytest.raises(OptionError, match=rf"score 'given', layers\.0: {reason}"):
        score_experts(Given(), experts())
