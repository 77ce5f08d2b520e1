"""Scores of experts from their weights, against plain torch."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from support.checkpoints import load
from support.mixtures import EXPERTS, make_mixture
from support.shrinking import found_plan, workers

from emp_llm import CheckpointError, effective_number
from emp_llm.runtime.workers import Workers
from emp_llm.shrinking.expert_criterion_registry import find_expert_criterion
from emp_llm.shrinking.expert_scores import ExpertScores
from emp_llm.shrinking.plan import ShrinkPlan

LAYER = "model.layers.1"
MIXTRAL = f"{LAYER}.block_sparse_moe.experts"

MATRICES = {
    "mixtral": lambda tensors, e: [
        tensors[f"{LAYER}.block_sparse_moe.experts.{e}.{leaf}.weight"]
        for leaf in ("w1", "w2", "w3")
    ],
    "deepseek-v3": lambda tensors, e: [  # not the shared expert
        tensors[f"{LAYER}.mlp.experts.{e}.{leaf}_proj.weight"] for leaf in ("gate", "up", "down")
    ],
    "gpt-oss": lambda tensors, e: [  # fused; not their biases
        tensors[f"{LAYER}.mlp.experts.{leaf}_proj"][e] for leaf in ("gate_up", "down")
    ],
}


def aimer_scores(plan: ShrinkPlan, workers: Workers) -> dict[str, tuple[float, ...]]:
    return ExpertScores(plan, workers, None).by(find_expert_criterion("aimer"))


def aimer(matrices: Iterable[torch.Tensor]) -> float:
    """Mean |w| over the root of the mean w², over all weights of an expert."""
    weights = torch.cat([matrix.double().reshape(-1) for matrix in matrices])
    return float(weights.abs().mean() / weights.square().mean().sqrt())


@pytest.mark.parametrize("architecture", MATRICES)
def test_aimer_is_mean_magnitude_over_rms_which_is_the_root_of_n_eff_over_n(
    tmp_path: Path, architecture: str
) -> None:
    model = make_mixture(architecture, torch.float32)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "experts." in name and tensor.ndim == 3:  # one expert of each kind
                tensor[0] = torch.sign(tensor[0])
                tensor[1] = tensor[1] ** 3
                tensor[2] = 0
    model.save_pretrained(tmp_path / "dense", max_shard_size=4000)
    tensors = load(tmp_path / "dense")
    experts = [MATRICES[architecture](tensors, e) for e in range(EXPERTS)]

    scores = aimer_scores(found_plan(tmp_path / "dense"), workers())[LAYER]

    assert scores[0] == pytest.approx(1)
    assert scores[2] == 1  # of zeros
    shown = [e for e in range(EXPERTS) if e != 2]
    assert [scores[e] for e in shown] == pytest.approx([aimer(experts[e]) for e in shown])
    together = torch.cat([matrix.reshape(-1) for matrix in experts[1]]).abs()
    n_eff = float(effective_number(together))
    assert scores[1] == pytest.approx((n_eff / together.numel()) ** 0.5)
    assert scores[1] < min(scores[e] for e in shown if e != 1)


def test_scores_do_not_depend_on_threads(tmp_path: Path) -> None:
    make_mixture("mixtral", torch.bfloat16).save_pretrained(tmp_path / "dense")
    plan = found_plan(tmp_path / "dense")
    assert aimer_scores(plan, workers(1)) == aimer_scores(plan, workers(3))


def test_an_expert_with_nan_is_refused_by_its_name(tmp_path: Path) -> None:
    model = make_mixture("gpt-oss", torch.bfloat16)
    name = f"{LAYER}.mlp.experts.down_proj"
    with torch.no_grad():
        model.get_parameter(name)[3, 0, 0] = torch.nan
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(CheckpointError, match=rf"'{name}' holds NaN or infinity"):
        aimer_scores(found_plan(tmp_path / "dense"), workers())
