"""Scores against a few lines of plain torch, and how a criterion is found."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from emp_llm import OptionError, PruneOptions, effective_number
from emp_llm.calibration.criteria import Criterion, score
from emp_llm.calibration.criterion_registry import (
    find_criterion,
    register_criterion,
)
from emp_llm.calibration.statistics import Statistics

R, C, T = 24, 40, 300


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(R, C, generator=torch.Generator().manual_seed(1)) * 0.02


@pytest.fixture
def inputs() -> torch.Tensor:
    """Inputs that depend on each other, of different sizes."""
    generator = torch.Generator().manual_seed(2)
    mixed = torch.randn(T, C, generator=generator) @ torch.randn(C, C, generator=generator)
    return mixed * torch.logspace(-1, 1, C)


def found(inputs: torch.Tensor, **more: Any) -> Statistics:
    x = inputs.double()
    return Statistics(
        tensor="model.layers.0.mlp.up_proj.weight",
        tokens=len(x),
        norms_C=x.norm(dim=0),
        means_C=x.mean(0),
        hessian_CC=(x.T @ x).float(),
        **more,
    )


def as_float64(tensor: torch.Tensor | None) -> Any:
    assert tensor is not None
    return tensor.double().numpy()


def of(name: str, weight: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    return score(find_criterion(name), weight, statistics)


def published_mask(metric: torch.Tensor, dropped: int) -> torch.Tensor:
    """What the code of Wanda and RIA keeps: per row, all but the smallest by a stable sort."""
    order = torch.sort(metric, dim=-1, stable=True)[1][:, :dropped]
    pruned = torch.zeros_like(metric, dtype=torch.bool).scatter_(1, order, True)
    return ~pruned


def test_magnitude_is_the_absolute_weight(weight: torch.Tensor) -> None:
    scores = of("magnitude", weight, Statistics(tensor="w"))

    assert torch.equal(scores, torch.where(weight < 0, -weight, weight))


def test_wanda_is_the_weight_times_the_norm_of_its_input(
    weight: torch.Tensor, inputs: torch.Tensor
) -> None:
    scores = of("wanda", weight, found(inputs))

    expected = weight.abs() * inputs.norm(dim=0)
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=0)


def test_wanda_keeps_what_the_published_algorithm_keeps(
    weight: torch.Tensor, inputs: torch.Tensor
) -> None:
    scaler = torch.zeros(C)  # the mean over samples of the squared norms, sample after sample
    for number, sample in enumerate(inputs.split(T // 3)):
        scaler = scaler * number / (number + 1) + sample.norm(dim=0) ** 2 / (number + 1)
    metric = weight.abs() * scaler.sqrt()

    scores = of("wanda", weight, found(inputs))

    assert torch.equal(published_mask(scores, C // 2), published_mask(metric, C // 2))


def test_ria_keeps_what_the_published_algorithm_keeps(
    weight: torch.Tensor, inputs: torch.Tensor
) -> None:
    sizes = weight.abs()
    relative = sizes / sizes.sum(dim=0) + sizes / sizes.sum(dim=1).reshape(-1, 1)
    metric = relative * inputs.norm(dim=0).reshape(1, -1) ** 0.5

    scores = of("ria", weight, found(inputs))

    torch.testing.assert_close(scores, metric, rtol=1e-5, atol=0)
    assert torch.equal(published_mask(scores, C // 2), published_mask(metric, C // 2))


def test_ria_of_a_column_and_a_row_of_zeros_is_zero_there() -> None:
    weight = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 3.0]])
    statistics = Statistics(tensor="w", norms_C=torch.tensor([4.0, 4.0, 16.0], dtype=torch.float64))

    scores = of("ria", weight, statistics)

    # (1/1 + 1/4) · 2 and (3/3 + 3/4) · 4
    assert scores.tolist() == [[0, 0, 0], [0, 2.5, 7]]


def test_taylor_is_the_weight_times_its_gradient(weight: torch.Tensor) -> None:
    gradient = torch.randn(R, C, generator=torch.Generator().manual_seed(3)) * 1e-6

    scores = of("taylor", weight, Statistics(tensor="w", gradient_RC=gradient))

    torch.testing.assert_close(scores, (weight * gradient).abs(), rtol=1e-6, atol=0)


def test_obs_is_the_squared_weight_by_the_diagonal_of_the_inverse(
    weight: torch.Tensor, inputs: torch.Tensor
) -> None:
    statistics = found(inputs)
    hessian = as_float64(statistics.hessian_CC)
    damped = hessian + 0.01 * hessian.diagonal().mean() * np.eye(C)
    expected = as_float64(weight) ** 2 / np.linalg.inv(damped).diagonal()

    scores = of("obs", weight, statistics)

    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-4)


def test_obs_is_what_removing_a_weight_costs_when_the_others_adapt(
    weight: torch.Tensor, inputs: torch.Tensor
) -> None:
    statistics = found(inputs)
    scores = of("obs", weight, statistics)
    hessian = as_float64(statistics.hessian_CC)
    damped = hessian + 0.01 * hessian.diagonal().mean() * np.eye(C)
    w = as_float64(weight[0])

    for column in (0, 17, C - 1):
        rest = np.delete(np.arange(C), column)
        change = np.zeros(C)
        change[column] = -w[column]
        change[rest] = -np.linalg.solve(damped[np.ix_(rest, rest)], damped[rest] @ change)
        assert scores[0, column].item() == pytest.approx(change @ damped @ change, rel=1e-4)


def test_inputs_that_are_always_zero_score_zero(weight: torch.Tensor, inputs: torch.Tensor) -> None:
    inputs[:, 5] = 0

    for name in ("wanda", "ria", "obs"):
        scores = of(name, weight, found(inputs))
        assert scores[:, 5].tolist() == [0] * R
        assert (scores[:, 6] > 0).all()


@pytest.mark.parametrize("tokens", [0, 1, C // 2])
def test_fewer_tokens_than_inputs_leave_scores_finite(
    weight: torch.Tensor, inputs: torch.Tensor, tokens: int
) -> None:
    for name in ("wanda", "ria", "obs"):
        scores = of(name, weight, found(inputs[:tokens]))
        assert bool(scores.any()) == (tokens > 0)


def test_random_scores_are_uniform_and_depend_on_seed_name_and_row_only() -> None:
    def scores(rows: int, **which: Any) -> torch.Tensor:
        return of("random", torch.ones(rows, 1000), Statistics(**({"tensor": "w"} | which)))

    one = scores(8)

    assert torch.equal(one[3:5], scores(2, first_row=3))
    assert torch.equal(one, scores(8))
    for other in (scores(8, seed=1), scores(8, tensor="v"), scores(8, first_row=8)):
        assert not torch.equal(one, other)
    assert 0 <= one.min() < 0.01
    assert 0.99 < one.max() < 1
    assert one.mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(one * 2**24, (one * 2**24).round())


@pytest.mark.parametrize("factor", [2.0**-100, 2.0**100])
def test_scores_beyond_float32_keep_their_proportions(
    weight: torch.Tensor, inputs: torch.Tensor, factor: float
) -> None:
    gradient = torch.randn(R, C, generator=torch.Generator().manual_seed(3))
    statistics = found(inputs, gradient_RC=gradient)
    large = found(inputs, gradient_RC=gradient * factor)

    for name in ("taylor", "obs"):
        scores, scaled = of(name, weight, statistics), of(name, weight * factor, large)
        power = math.log2(scaled.max().item() / scores.max().item())
        assert power == round(power)
        assert 1 <= scaled.max() < 2
        torch.testing.assert_close(scaled, scores * 2**power, rtol=1e-6, atol=0)
        torch.testing.assert_close(effective_number(scaled), effective_number(scores))


def test_weights_are_scored_alike_in_one_piece_and_in_many(
    monkeypatch: pytest.MonkeyPatch, weight: torch.Tensor, inputs: torch.Tensor
) -> None:
    statistics = found(inputs, gradient_RC=weight.flip(0))
    names = ("wanda", "ria", "taylor", "obs")
    whole = [of(name, weight, statistics) for name in names]
    monkeypatch.setattr("emp_llm.calibration.criteria._CHUNK", 5 * C)

    for name, expected in zip(names, whole, strict=True):
        torch.testing.assert_close(of(name, weight, statistics), expected, rtol=1e-6, atol=0)


class Alternating(Criterion):
    """Of a user: every second column."""

    def scores(self, weight_RC: torch.Tensor, _: Statistics) -> torch.Tensor:
        return torch.arange(weight_RC.shape[1]).remainder(2).float().expand_as(weight_RC)


def test_the_registered_names() -> None:
    names = ("magnitude", "wanda", "ria", "taylor", "obs", "random")
    assert tuple(find_criterion(name).name for name in names) == names


def test_a_criterion_of_ones_own_is_found_however_it_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("emp_llm.calibration.criterion_registry._criteria._registered", {})
    own = f"{__name__}:Alternating"
    instance = Alternating()

    assert find_criterion(instance) is instance
    assert isinstance(find_criterion(Alternating), Alternating)
    assert isinstance(find_criterion(own), Alternating)
    assert find_criterion(own).name == own
    assert register_criterion(Alternating) is Alternating
    assert register_criterion(Alternating) is Alternating
    assert isinstance(find_criterion(Alternating.name), Alternating)
    assert score(instance, torch.zeros(1, 4), Statistics(tensor="w")).tolist() == [[0, 1, 0, 1]]


def test_a_module_of_the_current_directory_is_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "my_scores_here.py").write_text(
        "from emp_llm.calibration.criteria import Criterion\n"
        "class Ones(Criterion):\n"
        "    needs = frozenset({'norms'})\n"
        "    def scores(self, weight_RC, found):\n"
        "        return weight_RC.new_ones(weight_RC.shape)\n"
        "made = Ones()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])

    ones = find_criterion("my_scores_here:Ones")

    assert (ones.name, ones.needs) == ("my_scores_here:Ones", {"norms"})
    assert type(find_criterion("my_scores_here:made")) is type(ones)
    sys.modules.pop("my_scores_here")


def refusal(criterion: Any) -> str:
    with pytest.raises(OptionError) as caught:
        find_criterion(criterion)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_gradient_is_found_alone():
    class Both(Criterion):
        needs = frozenset({"gradient", "norms"})

        def scores(self, weight_RC, _found):
            return weight_RC.abs()

    assert "needs gradient, norms; gradients are computed in a pass of their own" in refusal(Both)


def test_what_is_no_criterion_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "broken_scores.py").write_text("1 / 0\n")
    (tmp_path / "other_scores.py").write_text(
        "from emp_llm.calibration.criteria import Criterion\n"
        "class Empty(Criterion): pass\n"
        "class Sized(Empty):\n"
        "    def __init__(self, size): pass\n"
        "    def scores(self, weight_RC, found): return weight_RC.abs()\n"
        "class Broken(Sized):\n"
        "    def __init__(self): raise RuntimeError('no moon')\n"
        "class Listed(Empty):\n"
        "    needs = ['norms']\n"
        "    def scores(self, weight_RC, found): return weight_RC.abs()\n"
        "class Needy(Empty):\n"
        "    needs = frozenset({'norms', 'moon'})\n"
        "    def scores(self, weight_RC, found): return weight_RC.abs()\n"
        "def function(weight_RC, found): return weight_RC.abs()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])

    assert refusal("wand") == (
        "criterion is 'wand'; choose one of magnitude, wanda, ria, taylor, obs, random, or give "
        "your own as module:Class"
    )
    assert "'no_such:A': no_such cannot be imported: ModuleNotFoundError" in refusal("no_such:A")
    assert "broken_scores cannot be imported: ZeroDivisionError" in refusal("broken_scores:A")
    assert "other_scores.py) has no Nobody: name a class" in refusal("other_scores:Nobody")
    assert "has no method scores(weight_RC, statistics)" in refusal("other_scores:Empty")
    assert "cannot be made without arguments (" in refusal("other_scores:Sized")
    assert "needs moon; calibration gathers norms, means, hessian, gradient" in refusal(
        "other_scores:Needy"
    )
    assert refusal("other_scores:Broken").startswith(
        "criterion 'other_scores:Broken' cannot be made without arguments (RuntimeError: no moon): "
    )
    assert "Listed': needs is ['norms']; make it a frozenset" in refusal("other_scores:Listed")
    assert "is a function, not a subclass" in refusal("other_scores:function")
    assert "is a class, not a subclass" in refusal("pathlib:Path")
    assert "is a class, not a subclass" in refusal(dict)
    for name in ("", ":", "wanda:", ":Wanda"):
        assert refusal(name).startswith(f"criterion is {name!r}; choose one of magnitude, ")
    named = "give its name: 'module:Class', or the one that emp_llm.register_criterion"
    for value in (Alternating, Alternating()):
        with pytest.raises(OptionError, match=named):
            PruneOptions(criterion=value)  # type: ignore[arg-type]
    for module in ("broken_scores", "other_scores"):
        sys.modules.pop(module, None)


def test_a_name_that_is_taken_is_refused() -> None:
    class Mine(Alternating):
        name = "wanda"

    with pytest.raises(OptionError, match=r"'wanda' is emp_llm.calibration.criteria.Wanda already"):
        register_criterion(Mine)
    assert type(find_criterion("wanda")).__name__ == "Wanda"


@pytest.mark.parametrize(
    ("scores", "reason"),
    [
        (torch.ones(2, 3).double(), r"scores are float64 \[2, 3\]; return float32 \[2, 3\]"),
        (torch.ones(3, 2), r"scores are float32 \[3, 2\]; return float32 \[2, 3\]"),
        (torch.full((2, 3), -1.0), r"scores are from -1\.0 to -1\.0; return finite ones"),
        (torch.tensor([[1.0, 2, 3], [4, math.nan, 6]]), r"scores are from nan to nan"),
        (torch.tensor([[1.0, 2, 3], [4, math.inf, 6]]), r"scores are from 1\.0 to inf"),
        (np.ones((2, 3), np.float32), "scores are a ndarray; return a tensor"),
    ],
)
def test_scores_that_cannot_be_ranked_are_refused(scores: Any, reason: str) -> None:
    class Given(Alternating):
        name = "given"

        def scores(self, *_: object) -> torch.Tensor:
            return scores

    with pytest.raises(OptionError, match=f"criterion 'given', w: {reason}"):
        score(Given(), torch.ones(2, 3), Statistics(tensor="w"))


def test_scores_that_record_gradients_are_taken_without_them(weight: torch.Tensor) -> None:
    class Learned(Alternating):
        def scores(self, weight_RC: torch.Tensor, _: Statistics) -> torch.Tensor:
            return torch.nn.Parameter(weight_RC.abs())

    assert (
        score(Learned(), weight, Statistics(tensor="w")).numpy().tolist() == weight.abs().tolist()
    )


def test_zeros_of_scores_have_no_sign() -> None:
    class Negative(Alternating):
        def scores(self, weight_RC: torch.Tensor, _: Statistics) -> torch.Tensor:
            return weight_RC * 0

    scores = score(Negative(), torch.tensor([[-1.0, 1.0]]), Statistics(tensor="w"))

    assert scores.view(torch.int32).tolist() == [[0, 0]]
