"""What experts give for the samples of a calibration, against plain torch on the whole model."""

from pathlib import Path

import pytest
import torch
from support.calibrated import expert_inputs, ids_of, opened, save_model, save_text
from support.checkpoints import load
from support.streaming import load_whole

from emp_llm.shrinking.routed_walk import routed_outputs

E, LAYERS = 4, 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_walk_sums_up_what_each_expert_of_a_mixtral_gives(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    source = save_model(tmp_path / "source", "mixtral", dtype=dtype)
    text = save_text(tmp_path / "words.txt")
    with opened(source, text, tmp_path, "none") as session:
        found = routed_outputs(session, E)
    assert list(found) == ["model.layers.0", "model.layers.1"]
    tensors, model = load(source), load_whole("mixtral", source)
    inputs = expert_inputs(model, ids_of(text), tensors)
    for layer in range(LAYERS):
        start = f"model.layers.{layer}.block_sparse_moe"
        sums = found[f"model.layers.{layer}"]
        for expert in range(E):
            x_TC = inputs[f"{start}.experts.{expert}.w1.weight"]
            logits_TE = (x_TC @ tensors[f"{start}.gate.weight"].T).float()
            best_TK = logits_TE.topk(2).values.exp()
            gates_T = logits_TE[:, expert].exp() / best_TK.sum(dim=1)
            down = tensors[f"{start}.experts.{expert}.w2.weight"]
            outputs_TC = inputs[f"{start}.experts.{expert}.w2.weight"] @ down.T
            expected = (gates_T * outputs_TC.float().norm(dim=1)).sum().item()
            assert sums.tokens_E[expert] == len(x_TC)
            close = 1e-5 if dtype == torch.float32 else 1e-2
            assert sums.contributions_E[expert].item() == pytest.approx(expected, rel=close)


def test_blocks_without_experts_are_left_out(tmp_path: Path) -> None:
    source = save_model(tmp_path / "source", "deepseek-v3")
    text = save_text(tmp_path / "words.txt")
    with opened(source, text, tmp_path, "none") as session:
        found = routed_outputs(session, E)
        tokens = session.samples.ids_NL.numel()
    (sums,) = found.values()
    assert list(found) == ["model.layers.1"]
    assert sums.tokens_E.sum() == 2 * tokens
