"""The loss of smaller models that are not written yet, against plain torch."""

from pathlib import Path

import pytest
import torch
from support.calibrated import calibration, ids_of, save_text, save_tokenizer
from support.mixtures import layers_with_experts, make_mixture, routed_among
from support.stacks import bypassed, make_stack
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from emp_llm.calibration import session
from emp_llm.hub.source import find_source
from emp_llm.runtime.progress import SharedProgress, Silent
from emp_llm.selection.mask_store import MaskStore
from emp_llm.shrinking.choice import Choice, KindName
from emp_llm.shrinking.measuring import Measuring
from emp_llm.shrinking.plan import ShrinkPlan

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = 32


def measuring(
    tmp_path: Path, model: PreTrainedModel, kind: KindName
) -> tuple[Measuring, ShrinkPlan]:
    """A saved model, to be measured on a text of words."""
    progress = SharedProgress(Silent())
    model.save_pretrained(save_tokenizer(tmp_path / "dense", WORDS), max_shard_size=4000)
    source = find_source(tmp_path / "dense", progress=progress)
    plan = ShrinkPlan.make(source, source.open_checkpoint(), [kind])
    text = save_text(tmp_path / "words.txt")
    return Measuring(plan, calibration(text), progress, MaskStore(tmp_path / "store")), plan


def loss_of(model: PreTrainedModel, text: Path) -> float:
    ids = ids_of(text)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def test_the_loss_is_that_of_the_dense_model_with_blocks_bypassed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = make_stack("gemma3")
    measured, plan = measuring(tmp_path, dense, "blocks")
    (holder,) = plan.structures["blocks"].holders
    with measured.session() as opened:
        opened.begin("measuring")
        assert opened.loss(lambda _, tensor: tensor) == pytest.approx(
            loss_of(dense, tmp_path / "words.txt"), rel=1e-5
        )
    monkeypatch.delattr(session, "read_text")  # the samples have been read
    for kept in [(0, 2, 3, 5), (1,)]:
        with bypassed(dense, "gemma3", kept):
            expected = loss_of(dense, tmp_path / "words.txt")
        found = measured.loss([Choice(kind="blocks", kept={holder: kept})])
        assert found == pytest.approx(expected, rel=1e-5)


def test_tensors_are_cut_and_repaired_as_they_would_be_written(tmp_path: Path) -> None:
    dense = make_mixture("gpt-oss", torch.float32)
    measured, plan = measuring(tmp_path, dense, "experts")
    kept = dict.fromkeys(layers_with_experts(dense), (0, 2, 5))
    choice = Choice(
        kind="experts", kept=dict.fromkeys(plan.structures["experts"].holders, (0, 2, 5))
    )
    with routed_among(dense, kept):
        expected = loss_of(dense, tmp_path / "words.txt")
    assert measured.loss([choice]) == pytest.approx(expected, rel=1e-5)
    shapes = dict[str, torch.Size]()

    def repaired(name: str, tensor: torch.Tensor) -> torch.Tensor:
        shapes[name] = tensor.shape
        return tensor * 0 if name == "lm_head.weight" else tensor

    assert measured.loss([choice], repaired) == pytest.approx(
        torch.tensor(float(WORDS)).log().item()
    )
    assert shapes["model.layers.0.mlp.router.weight"][0] == 3
