"""The influence of decoder blocks, and the loss without them, against plain torch."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibrated import ids_of, opened, save_model, save_text
from support.streaming import load_whole
from torch import nn
from torch.nn.functional import cross_entropy

from emp_llm import CheckpointError
from emp_llm.shrinking import block_walk
from emp_llm.shrinking.block_walk import losses_without, measure_blocks

pytestmark = pytest.mark.usefixtures("one_thread")

# the list of blocks, and how many layers the config is told to have
LISTS = {
    "llama": ("model.layers", {"num_hidden_layers": 4}),
    "gpt2": ("transformer.h", {"n_layer": 4}),
    "falcon": ("transformer.h", {"num_hidden_layers": 4}),
    "gemma3": ("model.layers", {"num_hidden_layers": 4, "sliding_window": 3}),
    "gpt-oss": ("model.layers", {"num_hidden_layers": 4, "sliding_window": 3}),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "words.txt")


def save(folder: Path, architecture: str) -> Path:
    return save_model(folder, architecture, **LISTS[architecture][1])


def loss_without(architecture: str, folder: Path, ids_NL: torch.Tensor, some: Collection[int]):
    """The loss of the whole model, some of whose blocks return what they are given."""
    model = load_whole(architecture, folder)
    for number in some:
        block = model.get_submodule(f"{LISTS[architecture][0]}.{number}")
        tuples = architecture == "falcon"
        block.forward = lambda hidden, *_, tuples=tuples, **__: (hidden, None) if tuples else hidden
    with torch.no_grad():
        logits = model(input_ids=ids_NL, use_cache=False).logits
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids_NL[:, 1:].flatten()).item()


@pytest.mark.parametrize("architecture", LISTS)
def test_losses_without_blocks_are_those_of_the_whole_model_with_blocks_bypassed(
    tmp_path: Path, text: Path, architecture: str
) -> None:
    source, ids = save(tmp_path / "source", architecture), ids_of(text)
    removals: list[Collection[int]] = [{2}, {}, {0, 2}, {3}, {2, 3}, {0, 1, 2, 3}]
    name, _ = LISTS[architecture]
    with opened(source, text, tmp_path, "none") as session:
        blocks = measure_blocks(session)
        assert blocks.names == tuple(f"{name}.{number}" for number in range(4))
        found = losses_without(
            session, blocks, [{f"{name}.{number}" for number in some} for some in removals]
        )
    expected = [loss_without(architecture, source, ids, some) for some in removals]
    assert found == pytest.approx(expected, rel=1e-5)
    assert blocks.loss == pytest.approx(expected[1], rel=1e-5)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("architecture", ["llama", "falcon"])
def test_influence_is_one_minus_the_cosine_of_input_and_output(
    tmp_path: Path, text: Path, architecture: str
) -> None:
    source, ids = save(tmp_path / "source", architecture), ids_of(text)
    model, expected = load_whole(architecture, source), []

    def keep(_: nn.Module, args: Any, output: Any) -> None:
        before, after = args[0].double(), (output[0] if architecture == "falcon" else output)
        cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.double().norm(dim=-1)
        expected.append(1 - cosine.mean().item())

    for block in model.get_submodule(LISTS[architecture][0]):
        block.register_forward_hook(keep)
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    with opened(source, text, tmp_path, "none") as session:
        found = measure_blocks(session).influence
    assert found == pytest.approx(expected, rel=1e-4)


def test_models_that_do_not_fit_into_one_walk_are_run_in_several(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "source", "llama")
    removals = [{f"model.layers.{number}"} for number in range(4)]
    with opened(source, text, tmp_path, "none") as session:
        blocks = measure_blocks(session)
        together = losses_without(session, blocks, removals)
        monkeypatch.setattr(block_walk, "_THREADS", 3 * len(ids_of(text)))
        assert losses_without(session, blocks, removals) == together


@pytest.mark.parametrize(
    ("architecture", "found"),
    [("t5", "its lists of blocks are 'decoder.block', 'encoder.block'"), ("bert", "predicts no")],
)
def test_a_model_without_one_list_of_blocks_is_refused(
    tmp_path: Path, text: Path, architecture: str, found: str
) -> None:
    source = save_model(tmp_path / "source", architecture)
    with opened(source, text, tmp_path, "none") as session, pytest.raises(CheckpointError) as error:
        measure_blocks(session)
    assert found in str(error.value)
    assert "\n" not in str(error.value)
